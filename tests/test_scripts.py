"""The starts on a Slurm cluster and on Colab, as far as a machine that is neither can tell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

# Stands for a program: notes how it was called, and does what a test asks of it.
FAKE = """#!{python}
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
kept = {{k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "TOMJERRY_RUNS", "SLURM_NODEID")}}
call = {{"name": name, "arguments": sys.argv[1:], "cwd": os.getcwd(), **kept}}
with open({log!r}, "a") as file:
    file.write(json.dumps(call) + "\\n")
if name == "scontrol" and sys.argv[1:3] == ["show", "hostnames"]:
    print("node07\\nnode08")
if name == "srun":
    words = sys.argv[1:]
    while words[0].startswith("--"):
        words.pop(0)
    sys.exit(subprocess.call(words, env={{**os.environ, "SLURM_NODEID": "1"}}))
if name == "git":
    os.makedirs(os.path.join(sys.argv[-1], ".git"))
    os.makedirs(os.path.join(sys.argv[-1], "data"))
if name == "tomjerry" and os.environ.get("FAKE_FAILS") in sys.argv:
    sys.exit(2)
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder of programs to put on the PATH; `calls` reads what was asked of them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = str(tmp_path / "calls.jsonl")
    for name in ("srun", "scontrol", "accelerate", "tomjerry", "git"):
        (folder / name).write_text(FAKE.format(python=sys.executable, log=log))
        (folder / name).chmod(0o755)
    return folder


def calls(fakes: Path, name: str) -> list[dict]:
    log = fakes.parent / "calls.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row for row in rows if row["name"] == name]


def start(script: str, fakes: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_"))}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words],
        env={**plain, "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}", **environment},
        cwd=fakes.parent, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def slurm(fakes: Path, **environment: str) -> subprocess.CompletedProcess:
    job = {"SLURM_JOB_ID": "40123", "SLURM_SUBMIT_DIR": str(fakes.parent), "PROFILE": "smoke"}
    return start("slurm.sh", fakes, **{**job, **environment})


def options(words: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(words) if a.startswith("--")}


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.sh")))
def test_shell_scripts_are_whole(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0
    assert os.access(SCRIPTS / script, os.X_OK)


def test_slurm_launches_one_process_a_gpu_on_all_nodes(fakes: Path) -> None:
    done = slurm(
        fakes, SLURM_JOB_NUM_NODES="2", SLURM_GPUS_PER_NODE="a100:4", SLURM_CPUS_PER_TASK="24",
        SLURM_JOB_NODELIST="node[07-08]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (launch,) = calls(fakes, "accelerate")
    words = launch["arguments"]
    assert words[0] == "launch"
    assert "--multi_gpu" in words
    said = options(words)
    assert said["--num_processes"] == "8"
    assert said["--num_machines"] == "2"
    assert said["--machine_rank"] == "1"  # the node's own number, not that of the batch script
    assert said["--main_process_ip"] == "node07"
    assert said["--main_process_port"] == str(20000 + 40123 % 20000)
    assert words[words.index("scripts/stage.py") :] == [
        "scripts/stage.py", "04", "--profile", "smoke",
    ]  # fmt: skip
    assert launch["OMP_NUM_THREADS"] == "6"
    assert launch["cwd"] == str(fakes.parent)
    # Before it the first stages and after it the rest, on one node each; it alone is on both.
    before, middle, after = calls(fakes, "srun")
    assert all("--kill-on-bad-exit=1" in c["arguments"] for c in (before, middle, after))
    assert all({"--nodes=1", "--ntasks=1"} <= set(c["arguments"]) for c in (before, after))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(middle["arguments"])
    course = [call["arguments"] for call in calls(fakes, "tomjerry")]
    assert course == [
        ["course", "--profile", "smoke", "--only", "00", "01", "02", "03"],
        ["course", "--profile", "smoke"],
    ]


def test_slurm_with_one_gpu_launches_one_process(fakes: Path) -> None:
    done = slurm(fakes, SLURM_GPUS_ON_NODE="1", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0, done.stderr
    (launch,) = calls(fakes, "accelerate")
    assert "--multi_gpu" not in launch["arguments"]
    assert options(launch["arguments"])["--num_processes"] == "1"
    assert launch["OMP_NUM_THREADS"] == "8"


def test_slurm_stops_at_the_first_stage_that_fails(fakes: Path) -> None:
    done = slurm(fakes, SLURM_GPUS_ON_NODE="2", FAKE_FAILS="03")
    assert done.returncode == 2
    assert len(calls(fakes, "tomjerry")) == 1
    assert calls(fakes, "accelerate") == []
    outside = start("slurm.sh", fakes)
    assert outside.returncode != 0
    assert "sbatch" in outside.stderr


def test_slurm_queues_itself_again_before_its_time_is_up(fakes: Path) -> None:
    """The signal comes to the shell while a stage runs, and the shell does not wait for that."""
    note = fakes.parent / "stage.pid"
    (fakes / "srun").write_text(
        f"#!/bin/sh\necho $$ >{note}\nkill -USR1 $PPID\nexec sleep 600 >/dev/null 2>&1\n"
    )
    done = slurm(fakes)
    os.kill(int(note.read_text()), signal.SIGTERM)  # it is still there: nobody waited for it
    assert done.returncode > 128
    assert "queued again" in done.stdout
    assert ["requeue", "40123"] in [call["arguments"] for call in calls(fakes, "scontrol")]


def test_the_launched_stage_is_the_real_one(fakes: Path) -> None:
    """With accelerate itself, and a run in which stage 04 has nothing left to do but be read."""
    from tomjerry_utils import ldm
    from tomjerry_utils.profiles import load_profile

    made = ldm.ensure(load_profile("smoke"))
    before = (made.folder / "provenance.json").stat().st_mtime_ns
    (fakes / "accelerate").unlink()
    (fakes / "accelerate").symlink_to(Path(sys.executable).parent / "accelerate")
    (fakes.parent / "scripts").symlink_to(SCRIPTS)
    done = slurm(
        fakes, SLURM_GPUS_ON_NODE="1", PYTHONPATH=str(ROOT), TOMJERRY_ROOT=str(ROOT),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (made.folder / "provenance.json").stat().st_mtime_ns == before
    # A mistake is one line and ends the job.
    wrong = slurm(
        fakes, SLURM_GPUS_ON_NODE="1", PYTHONPATH=str(ROOT), PROFILE="smok", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert wrong.returncode != 0
    assert "did you mean 'smoke'" in wrong.stderr
    assert len(calls(fakes, "tomjerry")) == 3  # no course after it


def test_colab_clones_installs_and_runs_into_the_drive(fakes: Path) -> None:
    shutil.copy(fakes / "tomjerry", fakes / "python3")  # which is asked for pip
    home = fakes.parent
    where = {"COURSE": str(home / "course"), "DRIVE": str(home / "MyDrive" / "tomjerry")}
    # Without the Drive nothing begins: an hour's work would be lost with the machine.
    refused = start("colab.sh", fakes, **where)
    assert refused.returncode == 2
    assert "mount Google Drive" in refused.stderr
    assert not (home / "course").exists()

    (home / "MyDrive").mkdir()
    done = start("colab.sh", fakes, "--only", "04", **where)
    assert done.returncode == 0, done.stderr
    (clone,) = calls(fakes, "git")
    assert clone["arguments"][0] == "clone" and clone["arguments"][-1] == where["COURSE"]
    (pip,) = calls(fakes, "python3")
    assert pip["arguments"] == ["-m", "pip", "install", "-q", "-e", f"{home}/course[notebooks]"]
    (course,) = calls(fakes, "tomjerry")
    assert course["arguments"] == ["course", "--profile", "colab", "--only", "04"]
    assert course["cwd"] == where["COURSE"]
    assert course["TOMJERRY_RUNS"] == f"{where['DRIVE']}/runs"
    assert (home / "MyDrive" / "tomjerry" / "runs").is_dir()
    assert (home / "course" / "data" / "raw").resolve() == home / "MyDrive" / "tomjerry" / "raw"

    # After a disconnect, or once more: what is there stays.
    again = start("colab.sh", fakes, **where)
    assert again.returncode == 0, again.stderr
    assert len(calls(fakes, "git")) == 1
    assert calls(fakes, "tomjerry")[-1]["arguments"] == ["course", "--profile", "colab"]
