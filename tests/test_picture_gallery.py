"""The notebook's gallery: tiles, filters and keys; decisions on disk; a sheet to look at."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, picture_gallery, picture_sheet
from tomjerry_utils.picture_review import Decision, apply, read_decisions, write_decisions
from tomjerry_utils.sources import make_row


def sha(number: int) -> str:
    return hashlib.sha256(f"{number}".encode()).hexdigest()


def rows(total: int) -> list[dict[str, Any]]:
    """Every third was dropped; classes take turns."""
    made = []
    for i in range(total):
        row = make_row("film" if i % 2 else "folder", f"images/cartoon/{i}.png", "k",
                       domain="cartoon", **{"class": ("tom", "jerry", "both")[i % 3]})  # fmt: skip
        row.pop("_key")
        reason = f"blurred: sharpness <{i}" if i % 3 == 2 else ""
        made.append({**row, "sha256": sha(i), "kept": not reason, "reason": reason})
    return made


def picture(row: Any) -> np.ndarray:
    return np.full((60, 80, 3), 90, np.uint8)


def parts(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


class Gallery:
    """The widget as a person sees it."""

    def __init__(
        self, path: Path, given: Any = None, images: Any = picture, **options: Any
    ) -> None:
        given = rows(30) if given is None else given
        self.path = path
        self.box = picture_gallery.review(given, images, path, live=True, **options)
        (self.grid,) = [part for part in parts(self.box) if isinstance(part, ipywidgets.GridBox)]
        outside = [part for part in parts(self.box) if part not in set(parts(self.grid))]
        self.buttons = {b.description: b for b in outside if isinstance(b, ipywidgets.Button)}
        self.texts = {t.description: t for t in outside if isinstance(t, ipywidgets.Text)}
        self.filters = {d.description: d for d in outside if isinstance(d, ipywidgets.Dropdown)}
        self.html = [part for part in outside if isinstance(part, ipywidgets.HTML)]

    @property
    def told(self) -> str:
        return " ".join(part.value for part in self.html)

    @property
    def tiles(self) -> list[str]:
        return [tile.children[0].value for tile in self.grid.children]

    @property
    def chosen(self) -> list[int]:
        return [i for i, tile in enumerate(self.grid.children) if "4px" in tile.layout.border]

    def names(self) -> list[int]:
        return [int(tile.partition("cartoon/")[2].partition(".png")[0]) for tile in self.tiles]

    def type(self, letters: str) -> None:
        for letter in letters:
            self.texts["keys"].value += letter

    def press(self, tile: int, name: str) -> None:
        buttons = self.grid.children[tile].children[1].children
        next(b for b in buttons if b.description == name).click()

    def saved(self) -> dict[int, tuple[str, str, str]]:
        found = read_decisions(self.path)
        return {
            i: (found[sha(i)].decision, found[sha(i)].cls, found[sha(i)].note)
            for i in range(30)
            if sha(i) in found
        }


def test_tiles_tell_what_became_of_each_picture(tmp_path: Path) -> None:
    seen = Gallery(tmp_path / "d.jsonl")
    assert len(seen.tiles) == 24
    assert "page 1 of 2, 30 pictures listed" in seen.told
    assert "20 kept, 10 dropped, 0 not open to decisions" in seen.told
    assert "<b>dropped</b> · both · folder<br>blurred: sharpness &lt;2</div>" in seen.tiles[2]
    assert 'alt="jerry, kept: images/cartoon/1.png" style=' in seen.tiles[1]
    assert "data:image/jpeg;base64," in seen.tiles[1]
    assert seen.chosen == [0]
    assert "dashed" in seen.grid.children[2].layout.border
    seen.buttons["Page after"].click()
    assert seen.names() == [24, 25, 26, 27, 28, 29]
    seen.buttons["Page after"].click()
    assert "page 2 of 2" in seen.told
    seen.type("<")
    assert seen.names()[0] == 0


def test_letters_decide_and_are_on_disk_at_once(tmp_path: Path) -> None:
    seen = Gallery(tmp_path / "d.jsonl")
    seen.type("d")
    assert seen.saved() == {0: ("drop", "", "")}
    assert seen.chosen == [1]
    assert "0.png: drop" in seen.told
    seen.type(".2k")
    assert seen.saved()[2] == ("keep", "jerry", "")
    assert "<b>kept by hand</b> · jerry" in seen.tiles[2]
    assert "screened: blurred" in seen.tiles[2]
    seen.texts["note"].value = "a <logo>"
    seen.type("D")
    assert seen.saved()[3] == ("drop", "", "a <logo>")
    assert "a &lt;logo&gt;" in seen.tiles[3]
    seen.type("u")
    assert (3 in seen.saved(), seen.chosen) == (False, [3])
    seen.type(",,,0xs")
    assert list(seen.saved()) == [2]
    assert "all decisions are saved" in seen.told
    # A letter taken out of the box is no act, and typing goes on behind it.
    seen.texts["keys"].value = seen.texts["keys"].value[:-2]
    assert list(seen.saved()) == [2]
    seen.type("d")
    assert sorted(seen.saved()) == [0, 2]
    again = Gallery(tmp_path / "d.jsonl")
    assert "1 kept, 1 dropped, 1 class changed by hand" in again.told
    assert "<b>dropped by hand</b>" in again.tiles[0]


def test_buttons_do_all_that_letters_do(tmp_path: Path) -> None:
    seen = Gallery(tmp_path / "d.jsonl")
    seen.press(4, "drop")
    assert (seen.saved()[4], seen.chosen) == (("drop", "", ""), [4])
    seen.press(7, "pick")
    assert seen.chosen == [7]
    for name in ("both", "Keep"):
        seen.buttons[name].click()
    assert (seen.saved()[7], seen.chosen) == (("keep", "both", ""), [8])
    seen.press(7, "pick")
    seen.buttons["Take back"].click()
    seen.buttons["Undo"].click()
    seen.buttons["Undo"].click()
    seen.buttons["Undo"].click()
    assert list(seen.saved()) == [4]
    seen.buttons["Undo"].click()
    seen.buttons["Undo"].click()
    assert (seen.saved(), "nothing to undo" in seen.told) == ({}, True)


def test_filters_list_and_pictures_stay_until_asked_again(tmp_path: Path) -> None:
    seen = Gallery(tmp_path / "d.jsonl")
    seen.filters["show"].value = "dropped"
    assert seen.names() == list(range(2, 30, 3))
    seen.filters["source"].value = "film"
    assert seen.names() == list(range(5, 30, 6))
    seen.type("k")
    assert seen.names()[0] == 5
    seen.filters["source"].value = "all"
    assert 5 not in seen.names()
    seen.filters["show"].value = "decided by hand"
    assert seen.names() == [5]
    seen.filters["show"].value = "all"
    seen.filters["reason"].value = "blurred"
    assert seen.names() == list(range(2, 30, 3))
    seen.filters["class"].value = "tom"
    assert (seen.tiles, "no picture fits" in seen.told) == ([], True)
    seen.type("kdu1.,")
    assert set(seen.filters["class"].options) == {"all", "tom", "jerry", "both"}


def test_a_decision_that_cannot_be_written_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Gallery(tmp_path / "d.jsonl")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(picture_gallery, "record", refuse)
        seen.type("d")
    assert "disk full" in seen.told
    assert "<b>kept</b>" in seen.tiles[0]
    assert seen.chosen == [0]
    seen.type("d")
    assert list(seen.saved()) == [0]


def test_decisions_of_another_window_stay(tmp_path: Path) -> None:
    path = write_decisions(tmp_path / "d.jsonl", [Decision(sha(99), "far.png", "drop")])
    first, second = Gallery(path), Gallery(path)
    first.type("d")
    second.press(5, "drop")
    assert sorted(second.saved()) == [0, 5]
    assert sha(99) in read_decisions(path)
    assert "<b>dropped by hand</b>" in second.tiles[0]
    assert "1 fits no picture" in first.told


def test_rows_that_were_replayed_show_what_the_screens_said(tmp_path: Path) -> None:
    made = {sha(2): Decision(sha(2), "2.png", "keep"), sha(0): Decision(sha(0), "0.png", "drop")}
    seen = Gallery(tmp_path / "d.jsonl", apply(rows(6), made))
    assert "<b>kept</b>" in seen.tiles[0]
    assert "<b>dropped</b>" in seen.tiles[2]


# ---- where nobody can click ----------------------------------------------------------------------


def test_unattended_notebooks_get_a_small_picture(tmp_path: Path) -> None:
    path = write_decisions(tmp_path / "d.jsonl", [Decision(sha(1), "1.png", "drop")])
    shown = picture_gallery.review(rows(30), picture, path, live=False)
    assert shown.alt == (
        "Contact sheet of pictures with reasons. 0 kept, 1 dropped, 0 classes changed by hand."
    )
    assert Image.open(io.BytesIO(shown.data)).format == "JPEG"
    assert len(shown.data) < 200_000


def test_each_outcome_has_its_place_on_the_sheet() -> None:
    given = rows(60)
    given[57].update(kept=False, reason="black frame")
    decisions = {sha(0): Decision(sha(0), "0.png", "drop")}
    small = picture_sheet.contact_sheet(given, picture, decisions, limit=4, columns=2)
    # Of four, one of each outcome: 1 kept in blue, and three dropped in orange.
    colours = [tuple(small[y, x]) for y in (40, 200) for x in (3, 127)]
    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    assert sorted(colours) == sorted([blue, orange, orange, orange])
    again = picture_sheet.contact_sheet(given, picture, decisions, limit=4, columns=2)
    assert (small == again).all()
    changed = picture_sheet.contact_sheet(given, picture, {}, limit=4, columns=2)
    assert changed.shape != small.shape or (changed != small).any()
    one = picture_sheet.contact_sheet(given[:1], lambda row: np.zeros((900, 9, 3), np.uint8), {})
    assert one.shape[1] < 150


def test_outcomes_in_words() -> None:
    given = rows(3)
    made = {
        sha(2): Decision(sha(2), "2.png", "keep"),
        sha(0): Decision(sha(0), "0", "drop", note="x"),
    }
    first, second, third = apply(given, made)
    assert picture_sheet.told(first) == ("dropped by hand", "x")
    assert picture_sheet.told({**second, "blur": 12.3456}, "blur") == ("kept", "score 12.3")
    assert picture_sheet.told(third) == ("kept by hand", "screened: blurred: sharpness <2")
    # A class alone is not a word on keeping or dropping.
    made = {sha(i): Decision(sha(i), f"{i}.png", "class", "jerry") for i in range(3)}
    first, second, third = apply(given, made)
    assert picture_sheet.told(first) == ("kept", "class by hand, was tom")
    assert picture_sheet.told(second) == ("kept by hand", "")
    assert picture_sheet.told(third) == (
        "dropped",
        "blurred: sharpness <2; class by hand, was both",
    )


def test_long_words_and_missing_pictures_fit(tmp_path: Path) -> None:
    given = rows(3)
    given[2]["reason"] = "near-duplicate of " + "x" * 400 + " and some more words " * 20
    sheet = picture_sheet.contact_sheet(given, tmp_path, {})
    assert sheet.shape[1] == 3 * (96 + 28)
    # Below the title nothing is drawn between the tiles.
    assert (sheet[22:, [0, 123, 124]] == 255).all()


def test_nothing_to_review_is_told(tmp_path: Path) -> None:
    unread = [{**rows(1)[0], "sha256": "", "kept": False, "reason": "cannot be read: torn"}]
    for given in ([], unread):
        with pytest.raises(UserError, match="nothing to review"):
            picture_gallery.review(given, picture, tmp_path / "d.jsonl")
        with pytest.raises(UserError, match="nothing to show"):
            picture_sheet.contact_sheet(given, picture, {})
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1"):
        picture_gallery.review(rows(2), picture, tmp_path / "d.jsonl")


def test_widgets_and_torch_are_imported_by_need_alone() -> None:
    code = (
        "import sys, tomjerry_utils.picture_gallery, tomjerry_utils.picture_page\n"
        "assert not {'ipywidgets', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_papermill_stores_a_picture_and_no_widget_state(tmp_path: Path) -> None:
    import nbformat
    import papermill

    (tmp_path / "rows.json").write_text(json.dumps(rows(30)))
    cell = (
        "import json, numpy as np\nfrom pathlib import Path\n"
        "from tomjerry_utils import picture_gallery\n"
        "picture_gallery.review(json.loads(Path('rows.json').read_text()), "
        "lambda row: np.zeros((9, 9, 3), np.uint8), Path('d.jsonl'))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), cwd=str(tmp_path),
        progress_bar=False, start_timeout=600,
    )  # fmt: skip
    done = json.loads((tmp_path / "out.ipynb").read_text())
    (output,) = done["cells"][-1]["outputs"]
    assert "image/jpeg" in output["data"]
    assert "Contact sheet" in output["metadata"]["image/jpeg"]["alt"]
    assert "application/vnd.jupyter.widget-view+json" not in output["data"]
    assert "widgets" not in done["metadata"]
    assert not (tmp_path / "d.jsonl").exists()
