"""Pages that need no server and no network: one file that runs its own script and nothing else."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.images import load_image

Loader = Callable[[Mapping[str, Any]], np.ndarray]


def document(title: str, body: str, *, key: str, style: str, script: str) -> str:
    """A whole page as HTML.

    Nothing is loaded and this script alone may run, so that a text in the body could do no harm
    even if it were not escaped.

    Args:
        title: plain text.
        body: HTML.
        key: names what the page is about; in the script, `document.body.dataset.key`.
        style: CSS beyond what all pages share.
        script: JavaScript; it has `stored`, `store` and `offer` of `SCRIPT`.
    """
    whole = SCRIPT + script
    sealed = base64.b64encode(hashlib.sha256(whole.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{sealed}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body data-key="{escape(key)}">
{body}
<script>{whole}</script>
</body>
</html>
"""


def encoded(image: Image.Image | np.ndarray, *, lossless: int, quality: int) -> tuple[str, bytes]:
    """A picture's pixels alone, without the notes that its file may carry: ("png" | "jpeg", bytes).

    Args:
        image: a Pillow picture, or (H, W, 3) uint8.
        lossless: PNG up to this many pixels of the longer side, since small drawings suffer from
            JPEG; photographs would make a heavy page as PNG.
        quality: of the JPEG.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    kind = "png" if max(picture.size) <= lossless else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=quality)
    return kind, buffer.getvalue()


def thumbnail(
    row: Mapping[str, Any],
    images: Path | Loader,
    side: int = 192,
    *,
    lossless: int = 64,
    quality: int = 82,
) -> tuple[str, bytes]:
    """A small picture as its kind ("png", "jpeg") and bytes; "" and none where it cannot be had.

    Args:
        row: has a `file_name`.
        images: the folder that file names are relative to, or what gives a row's picture as
            (H, W, 3) uint8.
        side: pixels of the longer side at most.
        lossless, quality: as in `encoded`.
    """
    try:
        array = load_image(images / row["file_name"]) if isinstance(images, Path) else images(row)
    except (UserError, OSError):
        return "", b""
    image = Image.fromarray(array)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encoded(image, lossless=lossless, quality=quality)


def data_uri(kind: str, data: bytes) -> str:
    """The picture as the address of itself."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 0 1rem 4rem; }
h1 { font-size: 1.2rem; margin: 0; } header p { margin: .3rem 0; }
button, kbd, input { font: inherit; }
kbd { border: 1px solid GrayText; border-radius: 3px; padding: 0 .3em; }
:focus-visible { outline: 4px solid #56B4E9; outline-offset: 2px; }
"""

# A browser may keep nothing, as in a private window: both answer without an error then.
SCRIPT = """
"use strict";

function stored(place) {
  try { return JSON.parse(localStorage.getItem(place)); } catch { return null; }
}

function store(place, value) {
  try { localStorage.setItem(place, JSON.stringify(value)); return true; } catch { return false; }
}

function offer(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
}
"""
