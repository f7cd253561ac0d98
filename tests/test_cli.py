"""The command line: exit codes, one clear line for each mistake, nothing half-written."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caption_server import Server, pictures
from PIL import Image

from tomjerry_utils import UserError, __version__, cli, draw, scenes

COMMANDS = (
    "doctor", "course", "collect", "caption", "translate", "evaluate", "export", "figures",
    "scenes", "foundation", "study", "choose",
)  # fmt: skip
CAPTION_COMMANDS = ("estimate", "run", "batch", "review", "import")


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr that are not the log's."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]


def _mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as a user's mistake; return its one line."""
    code, _, lines = _run(capsys, *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("tomjerry: error: ")
    return lines[0]


# ---- help --------------------------------------------------------------------------------------


def _help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    told = _help(capsys)
    assert all(re.search(rf"^    {name}\b", told, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, *(f"caption {name}" for name in CAPTION_COMMANDS)])
def test_help_shows_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = _help(capsys, *name.split())
    examples = re.findall(rf"^  tomjerry ({name}\b.*)$", told, re.MULTILINE)
    assert examples
    for example in examples:
        assert cli._parser().parse_args(example.split()).handler


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"tomjerry {__version__}\n"


def test_module_and_script_are_one() -> None:
    for command in ([sys.executable, "-m", "tomjerry_utils"], [_script()]):
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert answer.stdout == f"tomjerry {__version__}\n"


def _script() -> str:
    return str(Path(sys.executable).parent / "tomjerry")


# ---- a user's mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["transalte"], "invalid choice: 'transalte'"),
        (["scenes", "--style", "oil", "--seeds", "0:1", "--out", "x"], "'oil'"),
        (["scenes", "--style", "cartoon", "--seeds", "5", "--out", "x"], "--seeds 5"),
        (["scenes", "--style", "cartoon", "--seeds", "5:5", "--out", "x"], "FIRST < END"),
        (["scenes", "--style", "cartoon", "--seeds=-1:5", "--out", "x"], "0 <= FIRST"),
        (["scenes", "--style", "cartoon", "--seeds", "0:1", "--size", "0", "--out", "x"], "--size"),
        (["scenes", "--style", "cartoon", "--seeds", "0:1", "--size", "9", "--out", "x"], "16"),
        (["scenes", "--style", "cartoon", "--seeds", "0:1"], "--out"),
        (["doctor", "--profile", "smok"], "did you mean 'smoke'"),
        (["course", "--profile", "none.yaml"], "none.yaml"),
        (["course", "--profile", "smoke", "--only", "77"], "no notebook '77'"),
        (["course", "--sync", "--check"], "not allowed with"),
        (["foundation", "gan"], "'gan'"),
        (["translate", "--out", "x"], "INPUT"),
        (["translate", "a.png", "--out", "x", "--class", "spike"], "'spike'"),
        (["translate", "a.png", "--out", "x", "--steps", "0"], "--steps"),
        (["translate", "a.png", "--out", "x", "--steps", "x"], "--steps"),
        (["translate", "a.png", "--out", "x", "--seed", "-1"], "--seed"),
        (["caption", "run", "--images", "x", "--model", "m", "--budget", "-1", "--out", "y"],
         "--budget"),
        (["caption", "run", "--images", "x", "--model", "m", "--budget", "1", "--price", "4",
          "--out", "y"], "IN,OUT"),
        (["caption"], "COMMAND"),
        (["caption", "buy"], "'buy'"),
        (["caption", "run", "--images", "x", "--model", "m", "--out", "y"], "--budget"),
        (["caption", "run", "--images", "x", "--model", "m", "--budget", "1", "--out", "y",
          "--longest-side", "0"], "--longest-side"),
        (["caption", "estimate", "--images", "/no/such", "--model", "gpt-4o"], "no folder /no"),
        (["caption", "estimate", "--images", ".", "--model", "llava"], "--price IN,OUT"),
        (["caption", "batch", "--images", "x", "--model", "m", "--budget", "1", "--out", "y",
          "--poll", "0"], "--poll"),
        (["caption", "review", "--images", "x", "--out", "y"], "no captions in y"),
        (["caption", "import", "b.csv", "--images", ".", "--out", "y"], "--model"),
        (["collect", "--out", "x"], "nothing to collect"),
        (["collect", "--folder", "/no/such/folder", "--out", "x"], "/no/such/folder"),
        (["collect", "--folder", ".", "--every", "0", "--out", "x"], "--every"),
        (["export", "--layout", "voc", "x"], "'voc'"),
    ],
)  # fmt: skip
def test_mistakes(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOMJERRY_ROOT", str(Path(__file__).resolve().parent.parent))
    monkeypatch.chdir(tmp_path)
    if "--only" in arguments:
        (tmp_path / "notebooks" / "src").mkdir(parents=True)
        (tmp_path / "notebooks" / "src" / "00_a.py").write_text("# %%\n1\n")
        monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    assert words in _mistake(capsys, *arguments)


def test_an_unknown_profile_key_names_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tomjerry_utils.profiles import FOLDER

    text = (FOLDER / "smoke.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    text = text.replace("name: smoke", "name: mine").replace("guidance_scale", "guidance_scales", 1)
    path.write_text(text, encoding="utf-8")
    told = _mistake(capsys, "doctor", "--profile", path)
    assert f"{path}: unknown key 'ldm.guidance_scales': did you mean 'guidance_scale'?" in told


# ---- bad places --------------------------------------------------------------------------------


def _draw(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    return _mistake(
        capsys, "scenes", "--style", "cartoon", "--seeds", "9000000:9000002", "--size", 32,
        "--out", out,
    )  # fmt: skip


def test_a_file_in_place_of_the_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("mine")
    assert str(place) in _draw(capsys, place)
    assert str(place) in _draw(capsys, place / "below")
    assert place.read_text() == "mine"


def test_a_read_only_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; the simulated case below covers the message")
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    assert "permission denied" in _draw(capsys, place / "out")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "can be written to"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "check the disk"),
    ],
)
def test_disks_that_refuse(
    number: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def refuse(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "replace", refuse)
    told = _draw(capsys, out)
    assert words in told
    assert str(out) in told
    # Nothing half-written: neither pictures nor temporary files.
    assert list(out.iterdir()) == []


def test_out_of_memory_names_the_knob(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class OutOfMemoryError(RuntimeError):
        """Has the name of torch's own."""

    def full(*_: Any, **__: Any) -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(draw, "draw_scenes", full)
    assert "batch_size" in _draw(capsys, tmp_path)


def test_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(draw, "draw_scenes", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["scenes", "--style", "cartoon", "--seeds", "0:1", "--out", str(tmp_path)])


def test_messages_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise UserError("two\nlines")

    monkeypatch.setattr(draw, "draw_scenes", wrong)
    assert _draw(capsys, tmp_path) == "tomjerry: error: two lines"


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m tomjerry_utils foundation --help | true"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in answer.stderr


# ---- scenes ------------------------------------------------------------------------------------


def test_scenes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seeds = range(9_000_000, 9_000_006)
    code, out, _ = _run(
        capsys, "scenes", "--style", "natural", "--seeds", f"{seeds.start}:{seeds.stop}",
        "--size", 48, "--out", tmp_path, "--truth",
    )  # fmt: skip
    assert code == 0
    assert "6 natural scenes" in out
    lines = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["seed"] for row in rows] == list(seeds)
    points = [json.loads(line) for line in (tmp_path / "keypoints.jsonl").open(encoding="utf-8")]
    for seed, row, found in zip(seeds, rows, points, strict=True):
        assert list(row) == ["file_name", "text", "class", "action", "facing", "place", "seed"]
        assert row["file_name"] == found["file_name"] == f"{seed}.png"
        scene = scenes.describe(seed)
        assert row["text"] == scenes.caption(scene, "natural")
        drawn = scenes.render(scene, "natural", 48, truth=True)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{seed}.png")), drawn.image)
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{seed}.png"))
        assert np.array_equal(mask, drawn.mask)
        kinds = {"tom": ["cat"], "jerry": ["mouse"], "both": ["cat", "mouse"]}[row["class"]]
        assert list(found["keypoints"]) == kinds
        for kind in kinds:
            assert list(found["keypoints"][kind]) == list(scenes.KEYPOINTS)
            # The animal's chest lies on the animal, so the names are not exchanged.
            x, y, visible = found["keypoints"][kind]["chest"]
            if visible and 0 <= x < 48 and 0 <= y < 48:
                near = mask[max(0, int(y) - 6) : int(y) + 7, max(0, int(x) - 6) : int(x) + 7]
                assert {"cat": 1, "mouse": 2}[kind] in near


def test_scenes_without_truth_and_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["scenes", "--style", "cartoon", "--seeds", "0:2", "--size", 32, "--out", tmp_path]
    assert _run(capsys, *arguments)[0] == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["0.png", "1.png", "metadata.jsonl"]
    assert _run(capsys, *arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


# ---- caption -----------------------------------------------------------------------------------


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_caption_from_estimate_to_review(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, server: Server
) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    asked = ["--images", images, "--model", "gpt-4o"]
    code, told, _ = _run(capsys, "caption", "estimate", *asked, "--out", out)
    assert code == 0
    assert "3: 3 to ask about, 0 answered before" in told
    assert not out.exists()
    paid = [*asked, "--base-url", server.url, "--budget", 1, "--concurrency", 2, "--out", out]
    code, told, _ = _run(capsys, "caption", "run", *paid)
    assert (code, len(server.requests)) == (0, 3)
    assert f"3 captions, 0 set aside, 0.0042 USD: {out / 'captions.jsonl'}" in told
    assert "0 to ask about, 3 answered" in _run(
        capsys, "caption", "estimate", *asked, "--out", out)[1]  # fmt: skip
    assert "--images" in _mistake(capsys, "caption", "review", "--out", out)
    code, told, _ = _run(capsys, "caption", "review", "--out", out, "--images", images)
    assert code == 0
    assert str(out / "review.html") in told
    rows = _rows(out / "captions.jsonl")
    decided = [
        {**{key: rows[0][key] for key in ("file_name", "sha256")}, "decision": "reject"},
        {"file_name": "99.png", "sha256": "0", "decision": "accept"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in decided))
    review = ["caption", "review", "--out", out, "--decisions", tmp_path / "d.jsonl"]
    code, told, _ = _run(capsys, *review)
    assert code == 0
    assert "skipped: 99.png: there is no caption of it" in told
    assert "2 captions, 1 set aside, 1 decisions skipped" in told
    (tmp_path / "d.jsonl").write_text("{")
    assert "d.jsonl, line 1: not valid JSON" in _mistake(capsys, *review)
    code, told, _ = _run(capsys, "caption", "run", *paid)
    assert "2 captions, 1 set aside" in told
    assert len(server.requests) == 3


def test_caption_settings_reach_the_request(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, server: Server
) -> None:
    images = pictures(tmp_path / "in", 1, size=200)
    code, _, _ = _run(
        capsys, "caption", "run", "--images", images, "--model", "mine", "--price", "1,2",
        "--detail", "low", "--longest-side", 48, "--timeout", 20, "--prompt-version", "v1",
        "--budget", 1, "--base-url", server.url, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    part = server.requests[0]["input"][0]["content"][0]
    assert part["detail"] == "low"
    data = base64.b64decode(part["image_url"].partition(";base64,")[2])
    assert Image.open(io.BytesIO(data)).size == (48, 48)
    (row,) = _rows(tmp_path / "out" / "captions.jsonl")
    assert row["usd"] == pytest.approx((400 * 1 + 40 * 2) / 1e6)


def test_caption_batch_returns_and_comes_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, server: Server
) -> None:
    images, out = pictures(tmp_path / "in", 3), tmp_path / "out"
    server.polls = 2
    arguments = [
        "caption", "batch", "--images", images, "--model", "gpt-4o", "--budget", 1, "--out", out,
        "--base-url", server.url, "--poll", 0.02,
    ]  # fmt: skip
    code, told, _ = _run(capsys, *arguments, "--no-wait")
    assert code == 0
    assert "0 captions, 3 in batches, 0 set aside" in told
    assert {row["status"] for row in _rows(out / "set_aside.jsonl")} == {"pending"}
    # Another machine collects with the folder alone.
    shutil.move(out, tmp_path / "far")
    shutil.rmtree(images)
    arguments[arguments.index(out)] = tmp_path / "far"
    code, told, _ = _run(capsys, *arguments)
    assert code == 0
    assert "3 captions, 0 set aside, 0.0021 USD" in told
    assert [row["file_name"] for row in _rows(tmp_path / "far" / "captions.jsonl")] == [
        "00.png",
        "01.png",
        "02.png",
    ]


def test_caption_import(capsys: pytest.CaptureFixture[str], tmp_path: Path, server: Server) -> None:
    images, out = pictures(tmp_path / "in", 2), tmp_path / "out"
    file = tmp_path / "bought.csv"
    file.write_text("file_name,caption,usd\n00.png,tom sits,0.25\nfar.png,x x,\n")
    arguments = ["--images", images, "--model", "gpt-4o", "--out", out]
    code, told, _ = _run(capsys, "caption", "import", file, *arguments)
    assert code == 0
    assert "line 3: far.png: no such picture" in told
    assert "1 captions imported, 0 known before, 1 lines skipped, 0.2500 USD paid elsew" in told
    file.write_text("file_name,caption\n00.png,tom, sits\n")
    assert "line 2" in _mistake(capsys, "caption", "import", file, *arguments)
    code, told, _ = _run(
        capsys, "caption", "run", *arguments, "--base-url", server.url, "--budget", 1
    )
    assert "2 captions, 0 set aside" in told
    assert len(server.requests) == 1


# ---- doctor ------------------------------------------------------------------------------------


def test_doctor_shows_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "kaggle.json").write_text('{"key": "also-secret"}')
    code, out, lines = _run(capsys, "doctor", "--profile", "smoke")
    assert code in (0, 2)
    assert "secret" not in out + "".join(lines)
    assert re.search(r"OpenAI key +set", out)
    assert re.search(r"Kaggle token +set", out)
    for word in ("python", "cores", "memory", "disk", "device", "torch", "run of smoke", "profile"):
        assert re.search(rf"^(ok|note|BAD) +{word}", out, re.MULTILINE), word


def test_doctor_finds_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tomjerry_utils import doctor

    monkeypatch.setenv("TOMJERRY_ROOT", str(tmp_path))
    for name in ("OPENAI_API_KEY", "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    for model in doctor.MODELS[1:]:
        folder = tmp_path / "data" / "foundation" / model
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"12345")
    promised = tmp_path / "data" / "foundation" / "blip" / "provenance.json"
    promised.write_text(json.dumps({"bytes": {"model.safetensors": 6}}))
    code, out, lines = _run(capsys, "doctor")
    assert code == 2
    assert re.search(r"BAD +weights autoencoder +missing", out)
    assert "should have 6 bytes" in out
    assert "5994471abb01112a" in out  # sha256 of 12345
    assert "weights autoencoder, weights blip" in lines[0]
    assert re.search(r"note +OpenAI key +not set", out)


@pytest.mark.parametrize(
    ("device", "memory", "profile"),
    [("cuda: A40", 44.0, "paper"), ("cuda: T4", 14.6, "colab"), ("cuda: MX", 4.0, "mini"),
     ("cpu", 0.0, "mini")],
)  # fmt: skip
def test_doctor_suggests(
    device: str, memory: float, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tomjerry_utils import doctor

    monkeypatch.setattr(doctor, "_device", lambda: (device, memory))
    assert doctor.suggest_profile().value.startswith(profile)


# ---- Ctrl-C ------------------------------------------------------------------------------------


def test_ctrl_c_is_130_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [_script(), "scenes", "--style", "natural", "--seeds", "9000000:9100000", "--size", "64",
         "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 600
    while not (tmp_path / "out" / "9000001.png").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    # As a terminal does: to the whole group, workers included.
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 130
    lines = [line for line in told.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert lines == ["tomjerry: stopped; start the same command again to go on"]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert not [name for name in names if name.startswith(".tmp-")]
    assert "metadata.jsonl" not in names
    for path in (tmp_path / "out").glob("*.png"):
        Image.open(path).load()


def test_an_error_with_words_of_its_own_keeps_them() -> None:
    assert cli._explain(OSError("cannot write a checkpoint to /x: full")) == (
        "cannot write a checkpoint to /x: full"
    )
    assert "check the path" in cli._explain(FileNotFoundError(errno.ENOENT, "No such file", "/y"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("translate", "x.png", "--out", "o", "--seed", "1" + 12 * "0"), "from 0 to 999999999999"),
        (("caption", "run", "--price", "nan,1"), "dollars per million"),
        (("caption", "run", "--price=-1,1"), "dollars per million"),
        (("caption", "run", "--price", "1,inf"), "dollars per million"),
    ],
)
def test_numbers_that_would_break_are_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _mistake(capsys, *options)
