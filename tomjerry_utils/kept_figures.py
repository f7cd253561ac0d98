"""What stage 06's later parts leave in a run, and its figures from committed numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name in `results/<profile>/course.json` → where a run has it; a run may lack any of them
PLACES = {
    "frontier": "06_frontier/frontier.json",
    "failures": "06_failures/failures.json",
    "best_of_n": "06_best_of_n/best_of_n.json",
}


def drawings(table: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures of what a course's numbers hold beyond its comparison: name → figure, alt text."""
    from tomjerry_utils import best_of_n, failure_figures, frontier

    found = {}
    if "frontier" in table:
        found["frontier"] = (
            frontier.frontier_figure(table["frontier"]),
            "KID against perceptual distance to the hidden twin: each method's sweep of settings "
            "as a line with 95 % intervals, ours marked, and shaded what ours dominates.",
        )
    if "failures" in table:
        found["failure_causes"] = (
            failure_figures.causes_figure(table["failures"]),
            "How many failed translations each stage is the first cause of, from the structure net "
            "to the denoiser, and what mends them.",
        )
    if "best_of_n" in table:
        found["best_of_n"] = (
            best_of_n.gain_figure(table["best_of_n"]),
            "What the best of one to eight tries gains over one try in perceptual distance, action "
            "accuracy and mask IoU, picked by the rule and by one who sees the twin.",
        )
    return found


def rivals_drawings(table: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """Figures of the study of rivals; none where its sweeps were not yet put to the rule."""
    from tomjerry_utils import frontier

    if "dominance" not in table:
        return {}
    return {
        "frontier": (
            frontier.frontier_figure(table),
            "KID against perceptual distance to the hidden twin: every rival's whole sweep as a "
            "line with 95 % intervals, ours marked, and shaded what ours dominates.",
        )
    }
