"""Controls for notebooks, and what stands in for them where nobody can click."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tomjerry_utils import UserError
from tomjerry_utils.caption_page import table
from tomjerry_utils.caption_review import (
    Decision,
    Verdict,
    count,
    decide,
    fits,
    read_decisions,
    recorded_caption,
    write_decisions,
)
from tomjerry_utils.static_page import Loader, thumbnail


def is_live() -> bool:
    """True where a person can click: in a kernel whose front end also takes input.

    Jupyter's own front ends, Colab's and editors' say with each cell that they can ask for input.
    What runs a notebook unattended (papermill, nbconvert, nbval) says that it cannot, and there a
    control would be stored as a state that no viewer can show.
    """
    if importlib.util.find_spec("ipywidgets") is None:
        return False
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        return False
    return bool(kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def review(
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions_path: Path,
    *,
    live: bool | None = None,
    limit: int = 8,
) -> Any:
    """Review captions in a notebook: one picture at a time, accept, edit or reject.

    All controls are buttons and a text box, so Tab and Enter are enough. Every decision is written
    to `decisions_path` at once, and a review goes on where that file ends.

    Args:
        rows: captions with `file_name`, `sha256`, `caption`, reviewed before or not.
        images: the folder that file names are relative to, or what gives a row's picture as
            (H, W, 3) uint8.
        live: show controls, or a table to look at; None finds out by `is_live`.
        limit: rows of that table.

    Returns:
        An ipywidgets box, or an `IPython.display.HTML` table that a stored notebook shows as well.

    Raises:
        UserError: no rows, or a file of decisions that is broken.
    """
    if not rows:
        raise UserError("nothing to review: there are no captions")
    decisions = read_decisions(decisions_path) if decisions_path.is_file() else {}
    if is_live() if live is None else live:
        return _Pager(rows, images, decisions_path, decisions).box
    from IPython.display import HTML

    told = count(_fitting(rows, decisions).values(), len(rows))
    return HTML(f"<p>{told}</p>{table(rows, images, decisions, limit=limit)}")


# ---- helpers -------------------------------------------------------------------------------------


def _fitting(
    rows: Sequence[Mapping[str, Any]], decisions: Mapping[str, Decision]
) -> dict[str, Decision]:
    """The decisions that are about these rows as they are."""
    return {
        row["file_name"]: decision
        for row in rows
        if (decision := decisions.get(row["file_name"])) and not fits(decision, row)
    }


class _Pager:
    """One row at a time, with its picture, its words and the buttons."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        images: Path | Loader,
        path: Path,
        decisions: dict[str, Decision],
    ) -> None:
        import ipywidgets

        self._rows, self._images, self._path = rows, images, path
        # Those about other captions are not shown, but stay in the file.
        self._all = decisions
        self._about = _fitting(rows, decisions)
        self._at = next((i for i in range(len(rows)) if self._is_open(i)), 0)
        self._picture = ipywidgets.Image(layout={"width": "192px", "object_fit": "contain"})
        self._told = ipywidgets.HTML()
        self._words = ipywidgets.Text(
            description="caption", continuous_update=False, layout={"width": "100%"}
        )
        buttons = [
            self._button("Previous", lambda: self._go(self._at - 1), "the caption before"),
            self._button("Accept", lambda: self._decide("accept"), "the caption as recorded"),
            self._button("Save edit", lambda: self._decide("edit"), "the words in the box"),
            self._button("Reject", lambda: self._decide("reject"), "leave this picture out"),
            self._button("Next", lambda: self._go(self._at + 1), "the caption after"),
            self._button("Next open", self._next_open, "the next one without a decision"),
        ]
        right = ipywidgets.VBox(
            [self._told, self._words, ipywidgets.HBox(buttons, layout={"flex_flow": "row wrap"})],
            layout={"flex": "1"},
        )
        self.box = ipywidgets.HBox([self._picture, right], layout={"align_items": "flex-start"})
        self._show()

    def _button(self, text: str, run: Any, tip: str) -> Any:
        import ipywidgets

        button = ipywidgets.Button(description=text, tooltip=tip, layout={"width": "auto"})
        button.on_click(lambda _: run())
        return button

    def _is_open(self, index: int) -> bool:
        return self._rows[index]["file_name"] not in self._about

    def _go(self, index: int) -> None:
        self._at = min(max(index, 0), len(self._rows) - 1)
        self._show()

    def _next_open(self) -> None:
        total = len(self._rows)
        later = ((self._at + step) % total for step in range(1, total + 1))
        self._go(next((i for i in later if self._is_open(i)), self._at))

    def _decide(self, verdict: Verdict) -> None:
        row = self._rows[self._at]
        name = row["file_name"]
        try:
            decision = decide(row, verdict, self._words.value)
            everything = {**self._all, name: decision}
            # Written first: what is shown as decided is on the disk.
            write_decisions(self._path, everything.values())
        except (UserError, OSError) as error:
            # A front end shows no error of a callback; the words in the box stay.
            return self._tell(str(error))
        self._all = everything
        self._about[name] = decision
        self._go(self._at + 1)

    def _show(self) -> None:
        row = self._rows[self._at]
        decision = self._about.get(row["file_name"])
        kind, data = thumbnail(row, self._images)
        self._picture.format, self._picture.value = kind or "png", data
        self._picture.tooltip = row["file_name"]
        self._words.value = decision.caption if decision else recorded_caption(row)
        self._tell()

    def _tell(self, complaint: str = "") -> None:
        row = self._rows[self._at]
        decision = self._about.get(row["file_name"])
        state = f"decided: {decision.decision}" if decision else "open"
        lines = [
            f"<b>{self._at + 1} of {len(self._rows)}</b> · {state} · {escape(row['file_name'])}",
            escape(recorded_caption(row)),
            count(self._about.values(), len(self._rows)),
            f"<b>{escape(complaint)}</b>" if complaint else "",
        ]
        self._told.value = "<br>".join(line for line in lines if line)
