"""The notebook's review: buttons, decisions on disk at once, a table where nobody can click."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import numpy as np
import pytest
from IPython.display import HTML
from PIL import Image

from tomjerry_utils import UserError, widgets
from tomjerry_utils.caption_review import Decision, read_decisions, write_decisions

ROWS = [
    {"file_name": f"{i}.png", "sha256": f"sha{i}", "caption": text}
    for i, text in enumerate(["tom <b>sits</b>", "jerry runs", "a cat lies"])
]


def parts(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


class Review:
    """The widget as a person sees it."""

    def __init__(self, path: Path, rows: Any = ROWS, images: Any = None) -> None:
        loader = images or (lambda row: np.full((40, 40, 3), 200, np.uint8))
        self.box = widgets.review(rows, loader, path, live=True)
        found = list(parts(self.box))
        self.buttons = {b.description: b for b in found if isinstance(b, ipywidgets.Button)}
        (self.text,) = [part for part in found if isinstance(part, ipywidgets.Text)]
        (self.told,) = [part for part in found if isinstance(part, ipywidgets.HTML)]
        (self.image,) = [part for part in found if isinstance(part, ipywidgets.Image)]

    def press(self, name: str) -> None:
        self.buttons[name].click()


def test_decisions_are_on_disk_at_once_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    page = Review(path)
    assert "1 of 3" in page.told.value
    assert "tom &lt;b&gt;sits&lt;/b&gt;" in page.told.value
    assert page.text.value == "tom <b>sits</b>"
    page.press("Accept")
    assert [d.decision for d in read_decisions(path).values()] == ["accept"]
    assert "2 of 3" in page.told.value
    page.text.value = "jerry  walks"
    page.press("Save edit")
    edited = read_decisions(path)["1.png"]
    assert edited == Decision("1.png", "sha1", "edit", "jerry walks", "jerry runs")
    again = Review(path)
    assert "3 of 3" in again.told.value
    assert "1 accepted, 1 edited, 0 rejected, 1 open" in again.told.value
    again.press("Reject")
    again.press("Previous")
    assert again.text.value == "jerry walks"
    again.press("Accept")
    found = read_decisions(path)
    assert {name: d.decision for name, d in found.items()} == {
        "0.png": "accept",
        "1.png": "accept",
        "2.png": "reject",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["review.jsonl"]


def test_pages_turn_and_stop_at_the_ends(tmp_path: Path) -> None:
    page = Review(tmp_path / "r.jsonl")
    page.press("Previous")
    assert "1 of 3" in page.told.value
    page.press("Next")
    page.press("Reject")
    page.press("Next")
    assert "3 of 3" in page.told.value
    page.press("Next open")
    assert "1 of 3" in page.told.value
    page.press("Next open")
    assert "3 of 3" in page.told.value
    assert all(isinstance(button, ipywidgets.Button) for button in page.buttons.values())


def test_an_edit_needs_words(tmp_path: Path) -> None:
    page = Review(tmp_path / "r.jsonl")
    page.text.value = "   "
    page.press("Save edit")
    assert "an edit needs words" in page.told.value
    assert not (tmp_path / "r.jsonl").exists()
    # The recorded words are no edit.
    page.text.value = ROWS[0]["caption"]
    page.press("Save edit")
    assert read_decisions(tmp_path / "r.jsonl")["0.png"].decision == "accept"


def test_decisions_about_other_captions_stay_in_the_file(tmp_path: Path) -> None:
    other = Decision("far.png", "s", "reject")
    outdated = Decision("1.png", "sha1", "reject", recorded="jerry stood")
    path = write_decisions(tmp_path / "r.jsonl", [other, outdated])
    page = Review(path)
    assert "3 open" in page.told.value
    page.press("Accept")
    found = read_decisions(path)
    assert (found["far.png"], found["1.png"]) == (other, outdated)
    assert found["0.png"].decision == "accept"


def test_reviewed_rows_are_judged_by_what_was_recorded(tmp_path: Path) -> None:
    rows = [{**ROWS[1], "caption": "jerry walks", "edited_from": "jerry runs"}]
    page = Review(tmp_path / "r.jsonl", rows)
    assert page.text.value == "jerry runs"
    page.press("Accept")
    assert read_decisions(tmp_path / "r.jsonl")["1.png"].caption == "jerry runs"


def test_pictures_come_from_a_folder(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 20, 3), 7, np.uint8)).save(tmp_path / "0.png")
    page = Review(tmp_path / "r.jsonl", images=tmp_path)
    assert bytes(page.image.value).startswith(b"\x89PNG")
    page.press("Next")  # 1.png is not there: no picture, and no complaint
    assert bytes(page.image.value) == b""


def test_a_failed_write_leaves_the_review_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Review(tmp_path / "r.jsonl")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    page.text.value = "tom lies"
    with monkeypatch.context() as patch:
        patch.setattr(widgets, "write_decisions", refuse)
        page.press("Save edit")
    assert "1 of 3" in page.told.value
    assert "disk full" in page.told.value
    assert "3 open" in page.told.value
    # The words are still there, and are taken once there is room.
    page.press("Save edit")
    assert read_decisions(tmp_path / "r.jsonl")["0.png"].caption == "tom lies"


# ---- where nobody can click ----------------------------------------------------------------------


def kernel(monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    parent = {"content": content}
    shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda channel: parent))
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: shell)


def test_unattended_notebooks_get_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_decisions(tmp_path / "r.jsonl", [Decision("1.png", "sha1", "reject")])

    def show() -> Any:
        return widgets.review(ROWS, lambda row: np.zeros((9, 9, 3), np.uint8), path)

    kernel(monkeypatch, allow_stdin=False)
    shown = show()
    assert isinstance(shown, HTML)
    assert "0 accepted, 0 edited, 1 rejected, 2 open" in shown.data
    assert "tom &lt;b&gt;sits" in shown.data
    assert "data:image/png;base64," in shown.data
    kernel(monkeypatch, allow_stdin=True)
    assert isinstance(show(), ipywidgets.Box)
    monkeypatch.setattr(widgets.importlib.util, "find_spec", lambda name: None)
    assert isinstance(show(), HTML)


def test_without_a_kernel_nothing_is_live() -> None:
    assert not widgets.is_live()


def test_ipywidgets_is_imported_by_need_alone() -> None:
    import subprocess

    code = "import sys, tomjerry_utils.widgets; assert 'ipywidgets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


CELL = (
    "import numpy as np\nfrom pathlib import Path\nfrom tomjerry_utils import widgets\n"
    f"widgets.review({ROWS!r}, lambda row: np.zeros((9, 9, 3), np.uint8), Path('r.jsonl'))"
)
WIDGET = "application/vnd.jupyter.widget-view+json"


def test_papermill_stores_no_widget_state(tmp_path: Path) -> None:
    import nbformat
    import papermill

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), cwd=str(tmp_path),
        progress_bar=False, start_timeout=600,
    )  # fmt: skip
    done = json.loads((tmp_path / "out.ipynb").read_text())
    (output,) = done["cells"][-1]["outputs"]
    assert "text/html" in output["data"]
    assert WIDGET not in output["data"]
    assert "widgets" not in done["metadata"]


def test_a_front_end_that_takes_input_gets_controls(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path), startup_timeout=600
    )
    shown: list[dict[str, Any]] = []

    def keep(message: dict[str, Any]) -> None:
        if message["msg_type"] == "execute_result":
            shown.append(message["content"]["data"])

    try:
        reply = client.execute_interactive(CELL, allow_stdin=True, output_hook=keep, timeout=600)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok"
    assert [WIDGET in data for data in shown] == [True]


def test_nothing_to_review_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to review"):
        widgets.review([], tmp_path, tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1"):
        widgets.review(ROWS, tmp_path, tmp_path / "r.jsonl")
