"""The generated world: one description, two renderers, exact truth. Imports nothing of ours."""

from .describe import (
    ACTIONS,
    CLASSES,
    FACINGS,
    LABELS,
    LIGHTS,
    PLACES,
    RANGES,
    STYLES,
    SUBJECTS,
    Actor,
    Scene,
    animate,
    caption,
    describe,
    label_of,
    vocabulary,
)
from .render import PARTS, Picture, flow, render, render_many
from .skeleton import KEYPOINTS

__all__ = [
    "ACTIONS",
    "CLASSES",
    "FACINGS",
    "KEYPOINTS",
    "LABELS",
    "LIGHTS",
    "PARTS",
    "PLACES",
    "RANGES",
    "STYLES",
    "SUBJECTS",
    "Actor",
    "Picture",
    "Scene",
    "animate",
    "caption",
    "describe",
    "flow",
    "label_of",
    "render",
    "render_many",
    "vocabulary",
]
