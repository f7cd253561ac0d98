"""The keep/drop gallery of stage 01 in a notebook, and a contact sheet where nobody can click."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tomjerry_utils import UserError
from tomjerry_utils.curate import kind_of
from tomjerry_utils.picture_page import THUMBNAIL, reviewable, thumb
from tomjerry_utils.picture_review import (
    Decision,
    Row,
    apply,
    count,
    decide,
    read_decisions,
    record,
)
from tomjerry_utils.picture_sheet import BLUE, ORANGE, contact_sheet, told
from tomjerry_utils.static_page import Loader, data_uri
from tomjerry_utils.widgets import is_live

STATES = ("all", "kept", "dropped", "decided by hand", "not decided")
ALL = "all"
# What a letter in the box of keys does; the rest of `ACTS` has buttons of the same names.
KEYS = {"k": "keep", "d": "drop", "1": "tom", "2": "jerry", "3": "both", "0": "clear"}
_HELP = (
    "Type into the box: <b>k</b> keep, <b>d</b> drop, <b>1</b> Tom or cat, <b>2</b> Jerry or mouse,"
    " <b>3</b> both, <b>0</b> take back, <b>u</b> undo, <b>.</b> next, <b>,</b> the one before,"
    " <b>&gt;</b> <b>&lt;</b> turn the page. Every decision is saved at once."
)


def review(
    rows: Sequence[Mapping[str, Any]],
    images: Path | Loader,
    decisions_path: Path,
    *,
    live: bool | None = None,
    per_page: int = 24,
    columns: int = 6,
    score: str = "score",
) -> Any:
    """Review pictures in a notebook: pages of thumbnails to keep, drop or give another class.

    Every decision is written to `decisions_path` at once, and a review goes on where that file
    ends. All of it works by Tab and Enter; letters typed into a box are faster. Widgets cannot see
    arrow keys: the page of `picture_page.write_page` does.

    Args:
        rows: of a manifest, reviewed before or not; those that nothing can be decided about
            (unreadable, exact duplicates) are counted only.
        images: the folder that file names are relative to, or what gives a row's picture as
            (H, W, 3) uint8.
        live: show controls, or a contact sheet to look at; None finds out by `widgets.is_live`.
        per_page: pictures on a page, or on the sheet.
        columns: of them in a row.
        score: the column of a number to show with the reason, where rows have it.

    Returns:
        An ipywidgets box, or an `IPython.display.Image` that a stored notebook shows as well.

    Raises:
        UserError: no row can be decided about, or a file of decisions that is broken.
    """
    if not reviewable(rows)[0]:
        raise UserError("nothing to review: no picture of these can be decided about")
    decisions = read_decisions(decisions_path) if decisions_path.is_file() else {}
    if is_live() if live is None else live:
        return _Gallery(rows, images, decisions_path, decisions, (per_page, columns), score).box
    from IPython.display import Image as Shown

    sheet = contact_sheet(rows, images, decisions, limit=per_page, columns=columns, score=score)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "jpeg", quality=80)
    alt = f"Contact sheet of pictures with reasons. {count(rows, decisions)}."
    return Shown(buffer.getvalue(), format="jpeg", alt=alt)


# ---- helpers -------------------------------------------------------------------------------------


class _Gallery:
    """A page of tiles, the filters over them, and the picture that keys and buttons are about."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        images: Path | Loader,
        path: Path,
        decisions: dict[str, Decision],
        shape: tuple[int, int],
        score: str,
    ) -> None:
        import ipywidgets as w

        self._rows, self._left_out = reviewable(rows)
        self._images, self._path, self._score = images, path, score
        self._decisions = decisions
        self._per_page, self._columns = shape
        self._undo: list[tuple[str, Decision | None]] = []
        self._order: list[int] = []
        self._at = 0
        self._typed = ""
        self._filling = False
        self._small: dict[int, tuple[str, bytes]] = {}
        self._filters = {
            name: w.Dropdown(description=name, options=[ALL], layout={"width": "16em"})
            for name in ("show", "class", "source", "reason")
        }
        self._told = w.HTML()
        self._place = w.HTML()
        self._keys = w.Text(description="keys", placeholder="k d 1 2 3 0 u . ,")
        self._note = w.Text(description="note", placeholder="goes with drops")
        self._grid = w.GridBox(
            layout={"grid_template_columns": f"repeat({self._columns}, minmax(0, 1fr))"}
        )
        self._tiles = [self._tile(slot) for slot in range(self._per_page)]
        acts = [("keep", "Keep"), ("drop", "Drop"), ("tom", "Tom / cat")]
        acts += [("jerry", "Jerry / mouse"), ("both", "both"), ("clear", "Take back")]
        buttons = [
            _button(text, partial(self._act, what), f"{text}: the chosen picture")
            for what, text in acts
        ]
        buttons.append(_button("Undo", self._take_back, "the last decision"))
        wrap = {"flex_flow": "row wrap"}
        self.box = w.VBox(
            [
                w.HTML(_HELP),
                w.HBox(list(self._filters.values()), layout=wrap),
                w.HBox(buttons, layout=wrap),
                w.HBox([self._keys, self._note], layout=wrap),
                self._told,
                self._grid,
                w.HBox(
                    [
                        _button("Page before", lambda: self._turn(-1), "the page before"),
                        _button("Page after", lambda: self._turn(1), "the page after"),
                        self._place,
                    ]
                ),
            ]
        )
        self._list()
        for dropdown in self._filters.values():
            dropdown.observe(lambda _: self._list(), "value")
        self._keys.observe(lambda change: self._type(change["new"]), "value")

    # ---- what is seen

    def _tile(self, slot: int) -> tuple[Any, Any]:
        import ipywidgets as w

        picture = w.HTML()
        buttons = [
            _button("pick", lambda: self._choose(slot), "then use the keys or the buttons above"),
            _button("keep", lambda: self._act("keep", slot), "keep this picture"),
            _button("drop", lambda: self._act("drop", slot), "drop this picture"),
        ]
        row = w.HBox(buttons, layout={"flex_flow": "row wrap"})
        return w.VBox([picture, row], layout={"padding": "4px", "margin": "2px"}), picture

    def _fits(self, row: Row) -> bool:
        show, cls, source, reason = (box.value for box in self._filters.values())
        state = {
            "kept": row["kept"],
            "dropped": not row["kept"],
            "decided by hand": bool(row["decided"]),
            "not decided": not row["decided"],
        }
        return (
            state.get(show, True)
            and cls in (ALL, row["class"] or "none")
            and source in (ALL, row["source"])
            and reason in (ALL, kind_of(row["reason"]), kind_of(row["screened"]))
        )

    def _list(self) -> None:
        """List what fits the filters; a picture stays listed until they change or a page turns."""
        if self._filling:
            return
        now = apply(self._rows, self._decisions)
        reasons = Counter(kind_of(text) for r in now for text in (r["reason"], r["screened"]))
        choices = {
            "show": list(STATES),
            "class": [ALL, *sorted({row["class"] or "none" for row in now})],
            "source": [ALL, *sorted({row["source"] for row in now})],
            "reason": [ALL, *sorted(reason for reason in reasons if reason)],
        }
        self._filling = True  # new options choose the first of them for a moment
        for name, dropdown in self._filters.items():
            if list(dropdown.options) != choices[name]:
                chosen = dropdown.value
                dropdown.options = choices[name]
                dropdown.value = chosen if chosen in choices[name] else ALL
        self._filling = False
        self._order = [index for index, row in enumerate(now) if self._fits(row)]
        self._at = 0
        self._show()

    def _show(self, message: str = "") -> None:
        first = self._at - self._at % self._per_page
        here = self._order[first : first + self._per_page]
        self._small = {
            index: self._small.get(index) or thumb(self._rows[index], self._images)
            for index in here
        }
        for slot, index in enumerate(here):
            self._show_tile(slot, index, first + slot == self._at)
        self._grid.children = [box for box, _ in self._tiles[: len(here)]]
        pages = -(-len(self._order) // self._per_page)
        place = f"page {first // self._per_page + 1} of {pages}" if here else "no picture fits"
        self._place.value = f"{place}, {len(self._order)} pictures listed"
        now = apply(self._rows, self._decisions)
        kept = sum(row["kept"] for row in now)
        lines = [
            f"{kept} kept, {len(now) - kept} dropped, {self._left_out} not open to decisions; "
            f"by hand: {count(self._rows, self._decisions)}",
            f"<b>{escape(message)}</b>" if message else "",
        ]
        self._told.value = "<br>".join(line for line in lines if line)

    def _show_tile(self, slot: int, index: int, chosen: bool) -> None:
        box, picture = self._tiles[slot]
        row = apply([self._rows[index]], self._decisions)[0]
        kind, data = self._small[index]
        state, why = told(row, self._score)
        cls = row["class"] or "no class"
        name = escape(row["file_name"])
        alt = f"{cls}, {state}: {name}"
        edge = f"width:{THUMBNAIL}px;height:{THUMBNAIL}px;object-fit:contain"
        source = data_uri(kind, data) if kind else ""
        shown = f'<img alt="{alt}" style="{edge}" src="{source}">' if kind else "no picture"
        told_by = f"<b>{state}</b> · {cls} · {escape(row['source'])}"
        picture.value = (
            f'<div title="{name}" style="line-height:1.25;overflow-wrap:anywhere;min-height:165px">'
            f"{shown}<br>{told_by}<br>{escape(why)}</div>"
        )
        style = "solid" if row["kept"] else "dashed"
        box.layout.border = f"{4 if chosen else 1}px {style} {BLUE if row['kept'] else ORANGE}"

    # ---- what is done

    def _choose(self, slot: int) -> None:
        self._at = self._at - self._at % self._per_page + slot
        self._show()

    def _go(self, at: int) -> None:
        self._at = min(max(at, 0), max(len(self._order) - 1, 0))
        self._show()

    def _turn(self, by: int) -> None:
        first = self._at - self._at % self._per_page + by * self._per_page
        if 0 <= first < len(self._order):
            self._go(first)

    def _act(self, what: str, slot: int | None = None) -> None:
        if slot is not None:
            self._at = self._at - self._at % self._per_page + slot
        if self._at >= len(self._order):
            return
        row = self._rows[self._order[self._at]]
        earlier = self._decisions.get(row["sha256"])
        made = decide(row, what, earlier, note=self._note.value)
        if made != earlier and not self._save(row["sha256"], made):
            return
        if made != earlier:
            self._undo.append((row["sha256"], earlier))
        # A class is often given together with keep or drop: only those two move on.
        moves = slot is None and what in ("keep", "drop")
        self._at = min(self._at + moves, len(self._order) - 1)
        name = row["file_name"].rpartition("/")[2]
        said = [made.decision, made.cls, made.note] if made else ["as screened"]
        self._show(f"{name}: {', '.join(word for word in said if word)}")

    def _take_back(self) -> None:
        if not self._undo:
            return self._show("nothing to undo")
        sha, earlier = self._undo[-1]
        if self._save(sha, earlier):
            self._undo.pop()
            places = [i for i, at in enumerate(self._order) if self._rows[at]["sha256"] == sha]
            self._at = places[0] if places else self._at
            self._show("undone")

    def _save(self, sha: str, decision: Decision | None) -> bool:
        """Written first: what is shown as decided is on the disk."""
        try:
            self._decisions = record(self._path, {sha: decision})
        except (UserError, OSError) as error:
            self._show(str(error))  # a front end shows no error of a callback
            return False
        return True

    def _type(self, value: str) -> None:
        """Act on what was typed since the last time; the box itself is never changed from here.

        Clearing it could lose letters that are on their way.
        """
        new = value[len(self._typed) :] if value.startswith(self._typed) else ""
        self._typed = value
        runs: dict[str, Callable[[], None]] = {
            ".": lambda: self._go(self._at + 1),
            ",": lambda: self._go(self._at - 1),
            ">": lambda: self._turn(1),
            "<": lambda: self._turn(-1),
            "u": self._take_back,
            "s": lambda: self._show(f"all decisions are saved in {self._path}"),
        }
        for letter in new.lower():
            if letter in KEYS:
                self._act(KEYS[letter])
            elif letter in runs:
                runs[letter]()


def _button(text: str, run: Callable[[], None], tip: str) -> Any:
    import ipywidgets

    layout = {"width": "auto", "padding": "0 6px"}
    button = ipywidgets.Button(description=text, tooltip=tip, layout=layout)
    button.on_click(lambda _: run())
    return button
