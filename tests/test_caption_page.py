"""The review page: complete in itself, safe against what a model writes, true to its decisions."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, caption_page
from tomjerry_utils.caption_review import Decision, decide

EVIL = """</p><script>alert("1")</script> & 'x' <img src=x onerror=y>"""


class Page(HTMLParser):
    """Tags with their attributes, and the text of paragraphs and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.captions: list[str] = []
        self._in = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in = "script"
            self.scripts.append("")
        if tag == "p" and dict(attrs).get("class") == "caption":
            self._in = "caption"
            self.captions.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "script"):
            self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in == "caption":
            self.captions[-1] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(row: Any) -> np.ndarray:
    return np.full((300, 400, 3), 90, np.uint8)


def rows(*captions: str) -> list[dict[str, Any]]:
    return [
        {"file_name": f"in/{i}.png", "sha256": f"sha{i}", "caption": text, "model": "<b>m</b>"}
        for i, text in enumerate(captions)
    ]


def test_page_shows_captions_and_escapes_them(tmp_path: Path) -> None:
    given = rows("tom sits", EVIL)
    path = caption_page.write_page(tmp_path / "review.html", given, picture, {})
    page = Page(path.read_text(encoding="utf-8"))
    assert page.captions == ["tom sits", EVIL]
    assert [article["data-recorded"] for article in page.all("article")] == ["tom sits", EVIL]
    assert len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    assert not page.all("b")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.all("img")) == 2


def test_page_needs_no_network_and_runs_its_own_script_only(tmp_path: Path) -> None:
    text = caption_page.write_page(tmp_path / "p.html", rows("a cat"), picture, {}).read_text()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    (image,) = page.all("img")
    data = base64.b64decode(image["src"].partition(";base64,")[2])
    assert Image.open(io.BytesIO(data)).size == (192, 144)
    assert image["alt"] == "in/0.png"


def test_page_is_for_the_keyboard_too(tmp_path: Path) -> None:
    page = Page(
        caption_page.write_page(tmp_path / "p.html", rows("a", "b", "c"), picture, {}).read_text()
    )
    assert [article["tabindex"] for article in page.all("article")] == ["0", "-1", "-1"]
    named = [button.get("data-do") or button["id"] for button in page.all("button")]
    assert named == ["download", *["accept", "edit", "reject"] * 3]
    assert len(page.all("input")) == 3
    assert all(field["aria-label"] for field in page.all("input"))
    assert page.all("kbd")


def test_page_starts_from_decisions_that_still_fit(tmp_path: Path) -> None:
    given = rows("tom sits", "jerry runs", "a cat lies", "a mouse")
    decisions = {
        "in/0.png": decide(given[0], "reject"),
        "in/1.png": decide(given[1], "edit", EVIL),
        "in/2.png": Decision("in/2.png", "sha2", "accept", recorded="a cat stood"),
    }
    first = caption_page.write_page(tmp_path / "p.html", given, picture, decisions).read_text()
    articles = Page(first).all("article")
    assert [a["data-verdict"] for a in articles] == ["reject", "edit", "", ""]
    assert articles[1]["data-words"] == EVIL
    # What a browser kept for another state of the review must not be taken for this one's.
    second = caption_page.write_page(tmp_path / "p.html", given, picture, {}).read_text()
    keys = [Page(text).all("body")[0]["data-key"] for text in (first, second)]
    assert keys[0] != keys[1]


def test_page_without_pictures_or_captions(tmp_path: Path) -> None:
    page = Page(
        caption_page.write_page(tmp_path / "p.html", rows("a cat"), tmp_path / "no", {}).read_text()
    )
    assert not page.all("img")
    assert page.captions == ["a cat"]
    with pytest.raises(UserError, match="no captions yet"):
        caption_page.write_page(tmp_path / "q.html", [], picture, {})
    assert not (tmp_path / "q.html").exists()


def test_table_is_short_and_escaped() -> None:
    given = rows("tom sits", EVIL, "c", "d")
    decisions = {"in/0.png": decide(given[0], "edit", "tom lies")}
    text = caption_page.table(given, picture, decisions, limit=2)
    page = Page(text)
    assert len(page.all("tr")) == 3
    assert not page.scripts
    assert "tom lies<br><s>tom sits</s>" in text
    assert "edited" in text
    assert "2 more" in text
    assert "more" not in caption_page.table(given, picture, {}, limit=4)
