"""Kaggle datasets: by folder, and by slug through kagglehub itself against a loopback server.

kagglehub is an optional package; the tests that need it are skipped where it is not installed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_server import File, Handler, Server, answer, failing, hang_up, serving

from tomjerry_utils import UserError, collect, kaggle, scenes, sources

FRAMES = "balabaskar/tom-and-jerry-image-classification"
CATS = "shaunthesheep/microsoft-catsvsdogs-dataset"
STORAGE = "http://storage.invalid/bundle.zip"
Files = dict[str, bytes]


def picture(seed: int) -> bytes:
    """A JPEG that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(buffer, "JPEG")
    return buffer.getvalue()


def frames() -> Files:
    """The layout of the Tom and Jerry frame set, in small."""
    lines, files = ["filename,tom,jerry"], {}
    for name, tom, jerry in (
        ("tom", 1, 0),
        ("jerry", 0, 1),
        ("tom_jerry_1", 1, 1),
        ("tom_jerry_0", 0, 0),
    ):
        for _ in range(3):
            number = len(files)
            files[f"tom_and_jerry/tom_and_jerry/{name}/frame{number}.jpg"] = picture(number)
            lines.append(f"frame{number}.jpg,{tom},{jerry}")
    return {**files, "ground_truth.csv": "\n".join(lines).encode()}


def cats() -> Files:
    """The layout of the cats-and-dogs set, with the damage that it has."""
    files = {f"PetImages/Cat/{i}.jpg": picture(i) for i in range(4)}
    files |= {f"PetImages/Dog/{i}.jpg": picture(100 + i) for i in range(4)}
    files |= {"PetImages/Cat/666.jpg": b"", "PetImages/Cat/10404.jpg": picture(9)[:200]}
    return {**files, "PetImages/Cat/Thumbs.db": b"db", "readme[1].txt": b"", "MSR.docx": b""}


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def gathered(out: Path, *where: str) -> collect.Collection:
    return collect.collect_command(out, kaggle=where, short_side=32, screen=False)


# ---- by folder -----------------------------------------------------------------------------------


def test_frames_by_folder_and_by_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", frames())
    local = gathered(tmp_path / "local", str(folder))
    classes = [row["class"] for row in local.select()]
    assert {name: classes.count(name) for name in scenes.CLASSES} == dict.fromkeys(
        scenes.CLASSES, 3
    )
    neither = [row for row in local.rows if not row["kept"]]
    assert {row["reason"] for row in neither} == {"shows neither character"}
    assert len(neither) == 3
    asked = []

    def dataset_download(slug: str) -> str:
        asked.append(slug)
        return str(folder)

    stand_in = types.SimpleNamespace(dataset_download=dataset_download)
    monkeypatch.setitem(sys.modules, "kagglehub", stand_in)
    remote = gathered(tmp_path / "remote", "someone/tom-and-jerry")
    assert asked == ["someone/tom-and-jerry"]
    assert remote.rows == local.rows


def test_cats_stay_though_many_are_damaged(tmp_path: Path) -> None:
    made = gathered(tmp_path / "out", str(write(tmp_path / "pets", cats())))
    assert {row["label"] for row in made.rows} == {"cat"}
    assert sorted(row["origin"] for row in made.select()) == [f"{i}.jpg" for i in range(4)]
    dropped = {row["origin"]: row["reason"] for row in made.rows if not row["kept"]}
    assert set(dropped) == {"666.jpg", "10404.jpg"}
    assert all(reason.startswith("cannot be read") for reason in dropped.values())


def test_other_layouts_and_no_slugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "other", {"birds/0.jpg": picture(1)})
    with pytest.raises(UserError, match=r"expected .* found birds; 1 \.jpg"):
        gathered(tmp_path / "out", str(tmp_path / "other"))
    write(tmp_path / "table", {"ground_truth.csv": b"file,cat\n", "0.jpg": picture(1)})
    with pytest.raises(UserError, match=r"filename,tom,jerry.* found ground_truth.csv \(cat,file"):
        gathered(tmp_path / "out", str(tmp_path / "table"))
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match="pip install kagglehub"):
        next(kaggle.kaggle_source("a/b", sources.Options(tmp_path)))
    for wrong in ("../x/y z", "../up", "a/b/versions/0", "a/b/versions/x", "a/b/c"):
        with pytest.raises(UserError, match="neither a folder nor a Kaggle slug"):
            kaggle.download(wrong)


# ---- by slug, through kagglehub ------------------------------------------------------------------


class Kaggle(Handler):
    """Kaggle as kagglehub 1.0 speaks to it: two calls of an API, and a storage it is sent to."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = self.path.rpartition("/")[2]
        sent = {"call": call, "body": body, "token": self.headers.get("Authorization")}
        self.server.requests.append(sent)
        if self.server.faults:
            return self.server.faults.pop(0)(self)
        if call == "GetDataset":
            newest = json.dumps({"currentVersionNumber": 7}).encode()
            return answer(self, 200, newest, {"Content-Type": "application/json"})
        if call == "DownloadDataset":
            return answer(self, 302, headers={"Location": STORAGE})
        answer(self, 404)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("kagglehub")
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "TBE_RUNTIME_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home" / ".kaggle"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    # Its only other addresses have fixed ports: this one is reached through a proxy, the server.
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setattr(kaggle, "PAUSE_S", 0.0)
    with serving(Kaggle) as server:
        monkeypatch.setenv("http_proxy", server.address)
        yield server


def bundle(server: Server, files: Files) -> File:
    """Put a dataset into the storage, as one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    content = buffer.getvalue()
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    held = File(content, headers={"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"})
    server.files[STORAGE] = held
    return held


def calls(server: Server) -> list[Any]:
    return [request.get("call") or request.get("Range", "GET") for request in server.requests]


def test_a_slug_is_fetched_once(hub: Server, tmp_path: Path) -> None:
    bundle(hub, frames())
    made = gathered(tmp_path / "out", FRAMES)
    assert calls(hub) == ["GetDataset", "DownloadDataset", "GET"]
    body = hub.requests[1]["body"]
    assert f"{body['ownerSlug']}/{body['datasetSlug']}" == FRAMES
    assert body["datasetVersionNumber"] == 7
    assert len(made.select()) == 9
    again = gathered(tmp_path / "out2", FRAMES)
    assert calls(hub)[3:] == ["GetDataset"]
    assert again.rows == made.rows
    # As by folder, but for the group, which is named after it: here the version in the cache.
    local = gathered(tmp_path / "local", str(write(tmp_path / "set", frames())))
    unnamed = {"group": "", "split": ""}
    assert [row | unnamed for row in made.rows] == [row | unnamed for row in local.rows]


def test_a_version_can_be_named(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(hub, frames())
    folder = kaggle.download(f"{FRAMES}/versions/3")
    assert calls(hub) == ["DownloadDataset", "GET"]
    assert hub.requests[0]["body"]["datasetVersionNumber"] == 3
    assert folder.name == "3"
    assert kaggle.download(f"{FRAMES}/versions/3") == folder
    assert len(hub.requests) == 2
    # What kagglehub says goes beside the results, not among them.
    assert capsys.readouterr().out == ""


def test_a_broken_download_goes_on(hub: Server, tmp_path: Path) -> None:
    # kagglehub keeps what has arrived in whole pieces of 1 MiB.
    held = bundle(hub, {**cats(), "more.bin": bytes(4_000_000)})
    held.breaks = [2_500_000]
    made = gathered(tmp_path / "out", f"{CATS}/versions/1")
    assert [request["Range"] for request in hub.requests if "Range" in request] == [
        f"bytes={2 * 2**20}-"
    ]
    assert len(made.select()) == 4


def test_what_may_pass_is_tried_again(hub: Server) -> None:
    bundle(hub, frames())
    hub.faults = [failing(503), hang_up, failing(429)]
    assert (kaggle.download(f"{FRAMES}/versions/1") / "ground_truth.csv").is_file()
    hub.faults = [failing(500)] * kaggle.TRIES
    with pytest.raises(UserError, match=r"answer 500, 5 times.*try again later"):
        kaggle.download(f"{FRAMES}/versions/2")
    held = bundle(hub, frames())
    held.headers["x-goog-hash"] = "md5=AAAAAAAAAAAAAAAAAAAAAA=="
    with pytest.raises(UserError, match="MD5 checksum") as caught:
        kaggle.download(f"{FRAMES}/versions/2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "token", "told"),
    [
        (401, "", r"refuses \(401\): it wants a token: .*KAGGLE_API_TOKEN"),
        (401, "t", r"the token from KAGGLE_API_TOKEN is not accepted"),
        (403, "", r"refuses \(403\): it wants a token"),
        (403, "t", rf"the account of KAGGLE_API_TOKEN may not read it, .*/datasets/{FRAMES}"),
        (404, "t", r"no such dataset or version \(404\)"),
    ],
)
def test_refusals_are_one_line(
    hub: Server, monkeypatch: pytest.MonkeyPatch, status: int, token: str, told: str
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    for slug in (FRAMES, f"{FRAMES}/versions/3"):
        hub.requests.clear()
        hub.faults = [failing(status)]
        with pytest.raises(UserError, match=told) as caught:
            kaggle.download(slug)
        assert "\n" not in str(caught.value)
        assert len(hub.requests) == 1


def test_nobody_there_is_one_line(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Kaggle) as gone:
        monkeypatch.setenv("http_proxy", gone.address)
    with pytest.raises(UserError, match=r"cannot be downloaded .*5 times.*: try again") as caught:
        kaggle.download(FRAMES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_layout_that_changed_is_told(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle(hub, cats())
    expected = r"expected ground_truth\.csv \(filename,tom,jerry\).*, found PetImages, .*10 \.jpg"
    with pytest.raises(UserError, match=expected) as caught:
        gathered(tmp_path / "out", FRAMES)
    assert "\n" not in str(caught.value)
    bundle(hub, frames())
    gathered(tmp_path / "out", f"{FRAMES}/versions/8")
    assert "expected 5478 pictures, found 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["none", "KAGGLE_API_TOKEN", "token file", "access_token", "pair", "kaggle.json"]
)
def test_tokens_are_named_as_kagglehub_finds_them(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Each source, with all those below it in kagglehub's order present as well."""
    order = ["KAGGLE_API_TOKEN", "token file", "access_token", "pair", "kaggle.json"]
    present = [] if source == "none" else order[order.index(source) :]
    home = tmp_path / "home" / ".kaggle"
    write(home, {"spare": b"from-a-file"})
    basic = base64.b64encode
    if "kaggle.json" in present:
        write(home, {"kaggle.json": json.dumps({"username": "ann", "key": "k1"}).encode()})
    if "pair" in present:
        monkeypatch.setenv("KAGGLE_USERNAME", "bob")
        monkeypatch.setenv("KAGGLE_KEY", "k2")
    if "access_token" in present:
        write(home, {"access_token": b"from-home\n"})
    if "token file" in present:
        monkeypatch.setenv("KAGGLE_API_TOKEN", str(home / "spare"))
    if "KAGGLE_API_TOKEN" in present:
        monkeypatch.setenv("KAGGLE_API_TOKEN", "from-environment")
    bundle(hub, frames())
    kaggle.download(f"{FRAMES}/versions/3")
    expected = {
        "none": (None, ""),
        "KAGGLE_API_TOKEN": ("Bearer from-environment", "KAGGLE_API_TOKEN"),
        "token file": ("Bearer from-a-file", "KAGGLE_API_TOKEN"),
        "access_token": ("Bearer from-home", str(home / "access_token")),
        "pair": (f"Basic {basic(b'bob:k2').decode()}", "KAGGLE_USERNAME and KAGGLE_KEY"),
        "kaggle.json": (f"Basic {basic(b'ann:k1').decode()}", str(home / "kaggle.json")),
    }
    assert (hub.requests[0]["token"], kaggle.credentials()) == expected[source]


def test_a_broken_token_file_is_one_line(hub: Server, tmp_path: Path) -> None:
    write(tmp_path / "home" / ".kaggle", {"kaggle.json": b"{"})
    with pytest.raises(UserError, match=r"Invalid Kaggle credentials file at .*kaggle\.json"):
        kaggle.download(FRAMES)
    assert hub.requests == []
