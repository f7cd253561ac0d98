"""Figures: three files with a provenance, equal bytes for equal figures, text that fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from tomjerry_utils import canvas, figures
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import hash_obj, open_stage

ALT = "Four flat pictures, from dark to light."


@pytest.fixture
def images() -> list[np.ndarray]:
    return [np.full((16, 16, 3), 50 * level, np.uint8) for level in range(1, 5)]


def texts(fig: Figure) -> list[mpl.text.Text]:
    return [text for text in fig.findobj(mpl.text.Text) if text.get_text().strip()]


def assert_texts_apart(fig: Figure) -> None:
    """No two texts overlap, and none leaves the figure by more than the saved margin."""
    fig.draw_without_rendering()
    boxes = [
        (text.get_text(), text.get_window_extent()) for text in texts(fig) if text.get_visible()
    ]
    for index, (name, box) in enumerate(boxes):
        for other, second in boxes[index + 1 :]:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert wide < 1 or high < 1, f"'{name}' and '{other}' overlap"


def test_save_writes_three_files_with_provenance(
    tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMJERRY_RUNS", str(tmp_path))
    profile = load_profile("smoke")
    stage = open_stage(profile, "01_collect", {"a": 1}, {})
    stage.finish()
    path = figures.save_figure(
        figures.contact_sheet(images), "sheet", alt=ALT, run=profile, notebook="01", extra={"n": 4}
    )
    assert path == tmp_path / "smoke/figures/sheet.png"
    assert sorted(p.name for p in path.parent.iterdir()) == ["sheet.json", "sheet.pdf", "sheet.png"]
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["alt"] == ALT
    assert record["notebook"] == "01"
    assert record["seed"] == profile.seed
    assert record["config"] == hash_obj(profile.model_dump(mode="json"))
    assert record["stages"] == {"01_collect": stage.key}
    assert record["extra"] == {"n": 4}
    assert record["run"] == "smoke"  # outside the project: no path of this machine
    assert {"python", "torch", "tomjerry_utils"} <= record["versions"].keys()
    with Image.open(path) as image:
        assert round(image.info["dpi"][0]) == 300


def test_a_run_folder_will_do_too(tmp_path: Path, images: list[np.ndarray]) -> None:
    path = figures.save_figure(figures.image_row(images), "row", alt=ALT, run=tmp_path / "mini")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["run"] == "mini"
    assert record["seed"] is None


def test_equal_figures_give_equal_bytes(tmp_path: Path, images: list[np.ndarray]) -> None:
    """In another process as well, and on another day: no dates, no random ids."""
    script = (
        "import numpy as np, sys; from pathlib import Path; from tomjerry_utils import figures;"
        "images = [np.full((16, 16, 3), 50 * n, np.uint8) for n in range(1, 5)];"
        "fig = figures.contact_sheet(images, ['a', 'b', 'c', 'd'], title='T $x$');"
        f"figures.save_figure(fig, 'f', alt={ALT!r}, run=Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True)
    fig = figures.contact_sheet(images, ["a", "b", "c", "d"], title="T $x$")
    figures.save_figure(fig, "f", alt=ALT, run=tmp_path / "b")
    for suffix in ("png", "pdf"):
        first, second = (tmp_path / run / "figures" / f"f.{suffix}" for run in "ab")
        assert first.read_bytes() == second.read_bytes(), suffix
    other = figures.contact_sheet(images, ["a", "b", "c", "e"], title="T $x$")
    path = figures.save_figure(other, "g", alt=ALT, run=tmp_path / "b")
    assert path.read_bytes() != (tmp_path / "b/figures/f.png").read_bytes()


def test_pdf_embeds_true_type_and_the_pictures_own_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    fig = figures.contact_sheet([noise], ["a caption"])
    path = figures.save_figure(fig, "f", alt=ALT, run=tmp_path)
    pdf = path.with_suffix(".pdf").read_bytes()
    assert b"/Width 32" in pdf
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    (image,) = fig.findobj(AxesImage)
    assert image.get_interpolation() == "lanczos"  # as before


def test_names_and_alt_texts_are_checked(tmp_path: Path, images: list[np.ndarray]) -> None:
    fig = figures.image_row(images)
    with pytest.raises(ValueError, match="figure name"):
        figures.save_figure(fig, "../up", alt=ALT, run=tmp_path)
    with pytest.raises(ValueError, match="alt text"):
        figures.save_figure(fig, "row", alt="", run=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_changes(tmp_path: Path, images: list[np.ndarray]) -> None:
    before = dict(mpl.rcParams)
    fig = figures.curve({"a": ([1, 2], [3, 4])})
    figures.save_figure(fig, "curve", alt="A line that rises once.", run=tmp_path)
    assert dict(mpl.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    figures.save_figure(plt.figure(), "empty", alt="Nothing at all to see.", run=tmp_path)
    assert plt.get_fignums() == []  # a notebook would show it a second time


def test_outside_a_notebook_nothing_is_shown_and_inside_with_alt_text(
    tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython.display

    shown: list[object] = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    figures.save_figure(figures.image_row(images), "a", alt=ALT, run=tmp_path)
    assert shown == []
    figures.save_figure(figures.image_row(images), "a", alt=ALT, run=tmp_path, show=True)
    (picture,) = shown
    data, metadata = picture._repr_mimebundle_()  # type: ignore[attr-defined]
    assert metadata["image/png"]["alt"] == ALT
    assert len(data["image/png"]) < 60_000


def test_contact_sheet_places_every_picture_and_text(images: list[np.ndarray]) -> None:
    long = "tom and jerry are jumping in the living room, facing left"
    fig = figures.contact_sheet(
        images,
        ["short", (long, "after"), long, "x"],
        columns=2,
        column_titles=["source", "a rather long heading"],
        row_titles=["Tom → cat", "Jerry → mouse"],
        title="A heading",
        frames=[None, figures.COLORS[0], None, None],
    )
    assert len(fig.findobj(AxesImage)) == 4
    assert_texts_apart(fig)
    bounds = [image.get_extent() for image in fig.findobj(AxesImage)]
    width, height = fig.get_size_inches()
    for x0, x1, y0, y1 in bounds:
        assert x1 - x0 == pytest.approx(y1 - y0)
        assert 0 <= x0 < x1 <= width + 1e-6
        assert 0 <= y0 < y1 <= height + 1e-6


def test_contact_sheet_shows_wide_pictures_whole() -> None:
    fig = figures.contact_sheet([np.zeros((10, 30, 3), np.uint8)], cell=1.5)
    ((x0, x1, y0, y1),) = [image.get_extent() for image in fig.findobj(AxesImage)]
    assert (x1 - x0, y1 - y0) == pytest.approx((1.5, 0.5))


def test_wrong_numbers_of_titles_are_told(images: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="titles: need 4, got 3"):
        figures.contact_sheet(images, ["a", "b", "c"])
    with pytest.raises(ValueError, match="row_titles: need 2, got 1"):
        figures.contact_sheet(images, columns=2, row_titles=["a"])
    with pytest.raises(ValueError, match="at least one"):
        figures.contact_sheet([])


def test_wrap_balances_and_keeps_breaks() -> None:
    text = canvas.wrap("tom is standing in the kitchen, facing left\nnew", 1.7, 8.5)
    lines = text.split("\n")
    assert lines[-1] == "new"
    assert len(lines) == 3
    assert abs(len(lines[0]) - len(lines[1])) < 6


def test_curve_draws_history_rows_and_labels_them() -> None:
    rows = [{"step": s, "loss": 1 / s, "other": None} for s in range(1, 61)]
    fig = figures.curve({"training": rows, "held out": rows, "third": rows}, title="Loss")
    (axes,) = fig.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [row["loss"] for row in rows])
    assert len(axes.lines) == 6  # each with its moving average
    assert_texts_apart(fig)  # three lines that end at one point
    with pytest.raises(ValueError, match="no row has"):
        figures.curve({"training": rows}, y="other")


def test_moving_average_is_a_mean() -> None:
    values = np.array([0.0, 3.0, 6.0, 3.0])
    np.testing.assert_allclose(figures._moving_average(values, 3), [1.5, 3, 4, 4.5])
    np.testing.assert_allclose(figures._moving_average(values, 1), values)


@pytest.mark.parametrize("top", [0.9, 90.0])
def test_log_axis_always_has_numbers(top: float) -> None:
    fig = figures.curve({"a": (np.arange(1, 50), np.geomspace(top, 0.3, 49))}, log=True)
    fig.draw_without_rendering()
    (axes,) = fig.axes
    low, high = axes.get_ylim()
    inside = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(inside) >= 3


def test_intervals_show_value_and_range() -> None:
    rows = {"identity": (0.41, 0.38, 0.44), "SDEdit": (0.22, 0.2, 0.25), "ours": (0.05, 0.04, 0.06)}
    fig = figures.intervals(
        rows, label="KID, lower is better", title="T", highlight=["ours"], bands={"floor": 0.01}
    )
    assert {"0.41", "0.22", "0.05", "floor"} <= {text.get_text() for text in texts(fig)}
    (axes,) = fig.axes
    assert axes.yaxis_inverted()  # the first row on top
    assert_texts_apart(fig)
    with pytest.raises(ValueError, match="no rows"):
        figures.intervals({}, label="x")


@pytest.mark.parametrize("with_result", [False, True])
def test_workflow_names_every_stage_and_fits(with_result: bool, images: list[np.ndarray]) -> None:
    result = (images[0], images[1]) if with_result else None
    fig = figures.workflow_diagram(images=500, captions=120, result=result)
    words = " ".join(text.get_text() for text in texts(fig))
    for number in ("01", "02", "03", "04", "05", "06", "500", "120"):
        assert number in words
    for word in ("Collect", "Caption", "BLIP", "latent diffusion", "Translate", "Compare"):
        assert word in words
    assert_texts_apart(fig)
    # Every text lies wholly within one box, or in the gap between boxes.
    fig.draw_without_rendering()
    boxes = [
        patch.get_window_extent()
        for patch in fig.findobj(mpl.patches.FancyBboxPatch)
        if patch.get_facecolor()[3] > 0
    ]
    assert len(boxes) == 6
    inside = 0
    for text in texts(fig):
        extent = text.get_window_extent()
        x, y = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        for box in boxes:
            if box.contains(x, y):
                inside += 1
                assert box.contains(extent.x0, extent.y0), text.get_text()
                assert box.contains(extent.x1, extent.y1), text.get_text()
    assert inside == len(texts(fig)) - 2  # but for the letters beside two arrows


def test_a_notebook_holds_large_sheets_as_jpeg_with_alt_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import IPython.display

    shown: list[object] = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    figures.save_figure(figures.contact_sheet(noise), "a", alt=ALT, run=tmp_path, show=True)
    data, metadata = shown[0]._repr_mimebundle_()  # type: ignore[attr-defined]
    assert data.keys() == {"image/jpeg"} and metadata["image/jpeg"]["alt"] == ALT
    assert len(data["image/jpeg"]) < 800_000
