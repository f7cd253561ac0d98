"""Exports: the layouts, their determinism, and what a killed export leaves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tomjerry_utils import UserError, cli, collect, exports, scenes
from tomjerry_utils.collect import Collection
from tomjerry_utils.profiles import load_profile
from tomjerry_utils.runs import hash_file, write_jsonl


@pytest.fixture(scope="module")
def smoke(session_runs: Path) -> Collection:
    return collect.ensure(load_profile("smoke"))


def noise(folder: Path, count: int, size: int = 40) -> Collection:
    """A collection of pictures that cost nothing, and hardly shrink when packed."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        label = scenes.LABELS[i % len(scenes.LABELS)]
        name = f"images/natural/a.b {i}.png"
        picture = np.random.default_rng(i).integers(0, 255, (size, size, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name)
        row = dict.fromkeys(exports._DETAILS, "")
        row |= {"file_name": name, "label": label, "text": f"no. {i}, ü", "place": None}
        rows.append(row | {"split": "validation" if i % 5 == 4 else "train"})
        rows[-1] |= {"role": "training", "kept": True, "domain": "natural", "class": "tom"}
    write_jsonl(folder / "manifest.jsonl", rows)
    return Collection(folder, size, "key")


def samples(path: Path) -> dict[str, dict[str, bytes]]:
    """What a reader of a shard sees: key → suffix → content, in the tar's order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            stream = archive.extractfile(member)
            assert stream is not None
            found.setdefault(key, {})[suffix] = stream.read()
    return found


def test_cyclegan_and_imagefolder(smoke: Collection, tmp_path: Path) -> None:
    counts = exports.export(smoke, tmp_path / "cyclegan", layout="cyclegan")
    train = len(smoke.select(domain="cartoon", split="train"))
    assert counts["trainA"] == train == len(list((tmp_path / "cyclegan" / "trainA").iterdir()))
    assert sum(counts.values()) == len(smoke.select())
    exports.export(smoke, tmp_path / "folder", layout="imagefolder")
    lines = (tmp_path / "folder" / "train" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(smoke.select(split="train"))
    note = json.loads(lines[0])
    assert (tmp_path / "folder" / "train" / note["file_name"]).is_file()
    assert note["text"]
    with pytest.raises(UserError, match="already holds"):
        exports.export(smoke, tmp_path / "cyclegan", layout="cyclegan")
    with pytest.raises(UserError, match="layout"):
        exports.export(smoke, tmp_path / "new", layout="voc")


def test_shards_hold_the_collection(smoke: Collection, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    counts = exports.export(smoke, out, layout="webdataset", shard_mb=0.05)
    index = json.loads((out / "shards.json").read_text())
    assert {path.name for path in out.iterdir()} == {"shards.json"} | {
        shard["file"] for split in index["splits"].values() for shard in split["shards"]
    }
    by_name = {row["file_name"]: row for row in smoke.select()}
    seen = []
    for split, found in index["splits"].items():
        assert found["samples"] == counts[split] == len(smoke.select(split=split))
        assert len(found["shards"]) > 1
        for number, shard in enumerate(found["shards"]):
            path = out / shard["file"]
            assert shard["file"] == f"{split}-{number:06d}.tar"
            assert (shard["bytes"], shard["sha256"]) == (path.stat().st_size, hash_file(path))
            held = samples(path)
            assert len(held) == shard["samples"]
            for sample in held.values():
                assert set(sample) == {"png", "txt", "cls", "json"}
                note = json.loads(sample["json"])
                row = by_name[note["file_name"]]
                assert row["split"] == split
                assert sample["png"] == smoke.path(row).read_bytes()
                assert sample["txt"].decode() == row["text"] == note["text"]
                assert index["labels"][int(sample["cls"])] == row["label"]
                seen.append(note["file_name"])
    assert sorted(seen) == sorted(by_name)


def test_shards_are_the_same_every_time_and_mixed(tmp_path: Path) -> None:
    made = noise(tmp_path / "data", 60)
    for name in ("a", "b"):
        exports.export(made, tmp_path / name, layout="webdataset", shard_mb=0.1)
        for path in (tmp_path / "data").rglob("*.png"):
            os.utime(path, (1, 1))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    # Of six classes in turn, the first shard holds more than a stretch of the manifest.
    first = [
        json.loads(s["json"])["file_name"] for s in samples(tmp_path / "a" / files[1]).values()
    ]
    order = [row["file_name"] for row in made.select(split="train")]
    assert [order.index(name) for name in first] != sorted(order.index(name) for name in first)
    exports.export(made, tmp_path / "c", layout="webdataset", shard_mb=0.1, seed=1)
    assert (tmp_path / "c" / files[1]).read_bytes() != (tmp_path / "a" / files[1]).read_bytes()


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    made = noise(tmp_path / "data", 40)
    exports.export(made, tmp_path / "out", layout="webdataset", shard_mb=0.04)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    assert max(sizes) <= 40_000
    assert min(sizes[:-1]) > 20_000
    # A sample larger than that has a tar of its own; none is lost.
    counts = exports.export(made, tmp_path / "one", layout="webdataset", shard_mb=0.001)
    assert len(list((tmp_path / "one").glob("*.tar"))) == sum(counts.values()) == 40


def test_memory_does_not_grow_with_the_export(tmp_path: Path) -> None:
    made = noise(tmp_path / "data", 40, size=200)  # 120 kB each
    exports.export(made, tmp_path / "warm", layout="webdataset")
    tracemalloc.start()
    exports.export(made, tmp_path / "out", layout="webdataset")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out" / "train-000000.tar").stat().st_size > 3_500_000
    assert most < 1_500_000


def test_a_killed_export_does_not_look_finished(tmp_path: Path) -> None:
    noise(tmp_path / "data", 20)
    call = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tomjerry_utils import exports\n"
        "from tomjerry_utils.collect import Collection\n"
        "sample, left = exports._sample, 9\n"
        "def last(*arguments):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return sample(*arguments)\n"
        "exports._sample = last\n"
        f"data = Path({str(tmp_path / 'data')!r})\n"
        "made = Collection(data, 40, 'key')\n"
        f"exports.export(made, Path({str(tmp_path / 'out')!r}), layout='webdataset', shard_mb=0.02)"
    )
    ended = subprocess.run([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.rglob("*.tar"))
    assert left, "it was killed too early to show anything"
    assert not list(tmp_path.rglob("shards.json"))
    made = noise(tmp_path / "data", 20)
    exports.export(made, tmp_path / "out", layout="webdataset", shard_mb=0.02)
    assert (tmp_path / "out" / "shards.json").is_file()


def test_the_package_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    made = noise(tmp_path / "data", 30)
    exports.export(made, tmp_path / "out", layout="webdataset", shard_mb=0.05)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    read = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    found = list(read.to_tuple("png", "txt", "cls", "json"))
    assert len(found) == len(made.select(split="train"))
    by_name = {row["file_name"]: row for row in made.rows}
    for picture, text, cls, note in found:
        row = by_name[note["file_name"]]
        assert picture.size == (40, 40)
        assert (text, scenes.LABELS[cls]) == (row["text"], row["label"])


def test_datasets_reads_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    datasets = pytest.importorskip("datasets")
    made = noise(tmp_path / "data", 30)
    exports.export(made, tmp_path / "out", layout="webdataset", shard_mb=0.05)
    read = datasets.load_dataset(
        "webdataset", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    assert {name: len(part) for name, part in read.items()} == {"train": 24, "validation": 6}
    sample = read["train"][0]
    row = next(r for r in made.rows if r["file_name"] == sample["json"]["file_name"])
    assert (sample["txt"], scenes.LABELS[int(sample["cls"])]) == (row["text"], row["label"])


def test_command(smoke: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMJERRY_PROFILE", "smoke")
    shards = ["--layout", "webdataset", "--shard-mb", "0.05"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["export", *shards, str(tmp_path / "out")]) == 0
    assert f"{len(smoke.select(split='train'))}  {tmp_path / 'out'}/train-*.tar" in said.getvalue()
    assert len(list((tmp_path / "out").glob("train-*.tar"))) > 1
    wrong = ["--layout", "cyclegan", "--shard-mb", "1", str(tmp_path / "b")]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(["export", *wrong]) == 2
    assert "goes with --layout webdataset" in said.getvalue()
