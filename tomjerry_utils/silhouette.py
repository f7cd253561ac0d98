"""Silhouettes of pictures that are far from training, by a net that has seen real pictures.

Our own segmenter learnt on generated scenes. On the starter cartoons it misses half of an animal,
where U²-Net-p (Qin et al. 2020, Pattern Recognition 106), which learnt on photographs what stands
out in a picture, finds nearly all of it; on generated cartoons it is the other way round.
`benchmarks/silhouettes.py` measures both. So `tomjerry translate --silhouette` takes the outline
of an animal from U²-Net-p where a picture is farther from training than :data:`FAR`, and nothing
else from it: what is fur and what an ear stays for our own net to say, as far as it can.

The net's weights are an ONNX file (:mod:`u2net`). :class:`Graph` computes it with torch, so that no
ONNX runtime (28 MB, and as fast) is needed; the two agree to 3e-6.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tomjerry_utils import structure, u2net
from tomjerry_utils.posture import pose_again
from tomjerry_utils.structure import FIRST_ANIMAL_PART, MOUSE

FAR = 1.2  # generated test cartoons reach 1.07, 95 % of the starter cartoons lie beyond 1.24
LEAST = 0.02  # of the picture: a smaller foreground is none
SIZE = 320  # pixels that the net learnt on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def foreground(images: np.ndarray) -> np.ndarray:
    """How much each pixel stands out from its picture.

    Give the pictures in their own resolution: of 64 pixels a side the net makes out far less.

    Args:
        images: (N, H, W, 3) uint8, any shape.

    Returns:
        (N, H, W) float32 in [0, 1].

    Raises:
        UserError: the weights are not there and cannot be fetched.
    """
    net = _net(u2net.weights())
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    out = []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        # The net was trained on pictures whose brightest value is 1.
        x = (x / x.amax().clamp(min=1) - mean) / std
        found = net(x.contiguous(memory_format=torch.channels_last))
        found = F.interpolate(found, image.shape[:2], mode="bilinear", antialias=True)
        out.append(found[0, 0].clamp(0, 1).numpy())
    return np.stack(out)


def outline(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """The foreground of a picture (H, W, 3) uint8, as shares of the pixels of another size.

    Returns:
        (height, width) float32 in [0, 1], or None where nothing stands out.
    """
    return sure(fit(foreground(image[None])[0], shape))


def sure(share: np.ndarray) -> np.ndarray | None:
    """A foreground (H, W), or None where nothing stands out."""
    return share if (share > 0.5).mean() >= LEAST else None


def fit(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) float32 as shares of the pixels of another size."""
    return F.interpolate(torch.from_numpy(mask)[None, None], shape, mode="area")[0, 0].numpy()


def redraw(maps: Tensor, outlines: Tensor) -> Tensor:
    """Part maps whose animals fill given outlines.

    An animal's parts outside become room, filled in from around; room inside becomes torso.

    Args:
        maps: (B, len(PARTS) + 1, H, W) from `structure.probabilities`.
        outlines: (B, H, W) in [0, 1].

    Returns:
        The same shape.
    """
    wanted = outlines[:, None].to(maps)
    room, parts, mouse = maps.split([FIRST_ANIMAL_PART, MOUSE - FIRST_ANIMAL_PART, 1], 1)
    animal = parts.sum(1, keepdim=True)
    kept = torch.minimum(animal, wanted) / animal.clamp(min=1e-6)
    parts, mouse = parts * kept, mouse * kept
    more = (wanted - parts.sum(1, keepdim=True)).clamp(min=0)
    # What is new belongs to the cat and the mouse as what is seen of them does.
    seen = parts.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
    mouse = mouse + more * mouse.sum((1, 2, 3), keepdim=True) / seen
    parts = torch.cat([parts[:, :1] + more, parts[:, 1:]], 1)
    bodies = torch.cat([parts, mouse], 1)
    return pose_again(torch.cat([room * (1 - wanted), bodies], 1), bodies)


def look(
    net: structure.StructureNet,
    images: Tensor,
    grid: tuple[int, int],
    outlines: Sequence[np.ndarray | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`structure.look`, but that animals fill their outlines in pictures that have one.

    Args:
        images: (N, H, W, 3) uint8; outlines: for each (H, W) in [0, 1], or None.
    """
    views, maps = structure.look(net, images, grid)
    for i, given in enumerate(outlines or []):
        if given is None:
            continue
        size = (maps.shape[-2], maps.shape[-1])
        small = torch.from_numpy(fit(given, size))[None]
        picture = images[i : i + 1].permute(0, 3, 1, 2).float() / 127.5 - 1
        maps[i : i + 1] = redraw(maps[i : i + 1], small)
        views[i : i + 1] = structure.view(
            maps[i : i + 1], F.interpolate(picture, size, mode="area"), grid
        )
    return views, maps


# ---- ONNX by torch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """One operation: names of its inputs, of its output, and its attributes."""

    kind: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """An ONNX file's net, of the few operations that U²-Net has; calling it gives its first output.

    Attributes:
        weights: by name; nodes: in the order of computation; source, output: names.
    """

    weights: dict[str, Tensor]
    nodes: list[Node]
    source: str
    output: str

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a file; its operators are those of ONNX's opset 11."""
        (graph,) = _fields(path.read_bytes())[7]
        parts = _fields(graph)
        initial = [_fields(tensor) for tensor in parts[5]]
        return cls(
            weights={t[8][0].decode(): _tensor(t) for t in initial},
            nodes=[_node(_fields(node)) for node in parts[1]],
            source=_fields(parts[11][0])[1][0].decode(),
            output=_fields(parts[12][0])[1][0].decode(),
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        last = {name: node for node in self.nodes for name in node.inputs}
        values = {**self.weights, self.source: x}
        for node in self.nodes:
            values[node.output] = _compute(node, [values[n] for n in node.inputs if n])
            if node.output == self.output:
                break
            # 500 maps of up to 26 MB: what nobody asks for again is let go.
            for name in set(node.inputs) - {""}:
                if last[name] is node:
                    del values[name]
        return values[self.output]


def _compute(node: Node, given: list[Tensor]) -> Tensor:
    x, *rest = given or [torch.empty(0)]
    at = node.attributes
    match node.kind:
        case "Conv":
            weight, bias = rest
            return F.conv2d(x, weight, bias, padding=at["pads"][:2], dilation=at["dilations"])
        case "Relu":
            return x.relu()
        case "Sigmoid":
            return x.sigmoid()
        case "MaxPool":
            return F.max_pool2d(x, at["kernel_shape"], at["strides"], ceil_mode=True)
        case "Add":
            return x + rest[0]
        case "Concat":
            return torch.cat(given, at["axis"])
        case "Resize":
            return F.interpolate(x, rest[-1][2:].tolist(), mode="bilinear")
        # The rest only computes what sizes to resize to.
        case "Constant":
            return at["value"]
        case "Shape":
            return torch.tensor(x.shape)
        case "Gather":
            return x[rest[0]]
        case "Unsqueeze":
            return x[None]
        case "Slice":
            return x[int(rest[0]) : int(rest[1])]
        case "Cast":
            return x.long()
    raise ValueError(f"no operation {node.kind}")


def _node(fields: dict[int, list[Any]]) -> Node:
    attributes = {}
    for attribute in map(_fields, fields[5]):
        # By its type: 2 a whole number, 4 a tensor, 7 whole numbers; no other is looked at.
        value: Any = None
        match attribute[20][0]:
            case 2:
                value = attribute[3][0]
            case 4:
                value = _tensor(_fields(attribute[5][0]))
            case 7:
                value = attribute[8]
        attributes[attribute[1][0].decode()] = value
    inputs = [name.decode() for name in fields[1]]
    return Node(fields[4][0].decode(), inputs, fields[2][0].decode(), attributes)


def _tensor(fields: dict[int, list[Any]]) -> Tensor:
    raw = fields[9][0]
    dtype = {1: "<f4", 7: "<i8"}[fields[2][0]]
    values = torch.from_numpy(np.frombuffer(raw, dtype).copy())
    return values.reshape(fields[1]) if fields[1] else values.squeeze()


def _fields(message: bytes) -> dict[int, list[Any]]:
    """A protocol buffers message: field number → its values, numbers or bytes."""
    out: dict[int, list[Any]] = defaultdict(list)
    for number, value in _walk(message):
        out[number].append(value)
    return out


def _walk(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0

    def whole() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(whole(), 8)
        if kind == 0:
            yield number, whole()
            continue
        length = whole() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[at : at + length]
        at += length


@lru_cache(maxsize=1)
def _net(path: Path) -> Graph:
    return Graph.load(path)
