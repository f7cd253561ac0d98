"""Figures of a collection: what they count and measure."""

from __future__ import annotations

import numpy as np
import pytest

from tomjerry_utils import collection_figures
from tomjerry_utils.sources import Row, make_row


def row(source: str, reason: str = "") -> Row:
    return make_row(source, "a", "", kept=not reason, reason=reason)


def test_the_funnel_counts_every_picture_once() -> None:
    rows = [
        *[row("film") for _ in range(5)],
        row("film", "blurred: by 3 px"),
        row("film", "duplicate of images/a.png"),
        row("folder", "cannot be read: torn.jpg"),
        row("folder", "near duplicate of images/b.png"),
        row("folder", "over the 3 asked for of this class and domain"),
        row("folder"),
    ]
    figure, left = collection_figures.funnel(rows)
    assert list(left["film"].values()) == [7, 7, 6, 5, 5]
    assert list(left["folder"].values()) == [4, 3, 3, 2, 1]
    steps, reasons = figure.axes
    shown = [[bar.get_width() for bar in bars] for bars in steps.containers]
    assert shown == [list(steps.values()) for steps in left.values()]
    drawn = sum(bar.get_width() for bars in reasons.containers for bar in bars)
    assert drawn == 5
    # With nothing dropped there is nothing to draw, and that is said.
    figure, _ = collection_figures.funnel([row("film")])
    assert "nothing was dropped" in [text.get_text() for text in figure.axes[1].texts]


def test_the_gap_is_the_share_of_variance_between_two_means() -> None:
    draws = np.random.default_rng(0)
    near = draws.normal(size=(400, 6))
    far = draws.normal(size=(400, 6)) + np.array([6.0, 0, 0, 0, 0, 0])
    pictures = np.zeros((400, 8, 8, 3), np.uint8)
    same = {"a": near, "b": draws.normal(size=(400, 6)), "c": far}
    _, gaps = collection_figures.domain_gap(same, dict.fromkeys(same, pictures))
    assert list(gaps) == ["a | b", "a | c", "b | c"]
    # Means 6 apart in one of six directions, each of unit variance: 9 of 9 + 6.
    assert gaps["a | c"] == pytest.approx(9 / 15, abs=0.03)
    assert gaps["a | b"] < 0.01
