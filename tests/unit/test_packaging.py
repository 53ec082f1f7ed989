"""What a user installs: the wheel holds every config, and both programs find them from anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import everstep
from everstep.compose import conf_dir

ROOT = Path(everstep.__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="these tests read a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools, and it is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves build/ and egg-info beside what it builds.
    for name in ("everstep", "trainer", "launch", "conf", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out), "."]
    subprocess.run(pip, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("everstep-*.whl")
    return built


def configs(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*.yaml")}


def modules() -> set[str]:
    """Every module, by its path in the package; `rglob` does not follow the links."""
    found = {str(file.relative_to(ROOT)) for file in (ROOT / "everstep").rglob("*.py")}
    for program in ("trainer", "launch"):
        found |= {f"everstep/{file.relative_to(ROOT)}" for file in (ROOT / program).rglob("*.py")}
    return found


@pytest.mark.process
def test_the_wheel_holds_every_config_and_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"everstep/conf/{name}" for name in configs(ROOT / "conf")} <= names
    assert modules() <= names
    assert {"everstep/py.typed", "everstep/slurm/run.sbatch", "everstep/trainer/data/series/co2_weekly.csv"} <= names


def test_the_wheel_holds_the_parts_of_a_report(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    there = ROOT / "launch" / "report"
    parts = {path for path in there.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(parts) >= 11
    assert {f"everstep/launch/report/{path.relative_to(there)}" for path in parts} <= names


@pytest.mark.process
def test_the_wheel_installs_nothing_under_a_name_that_others_use(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top == {"everstep", f"everstep-{everstep.__version__}.dist-info"}


@pytest.mark.process
def test_an_installed_wheel_composes_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = "from everstep import compose; print(compose.conf_dir()); print(sorted(compose.groups())); "
    code += "from everstep.launch.schedulers.slurm import sbatch; print(sbatch.script())"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert found[0] == str(target / "everstep" / "conf")
    assert "'parallel'" in found[1]
    assert found[2] == str(target / "everstep" / "slurm" / "run.sbatch")


def test_a_checkout_finds_its_own_configs() -> None:
    assert conf_dir() == ROOT / "everstep/conf"
    assert (conf_dir() / "run.yaml").exists()


def test_the_version_is_said_the_same_in_both_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == everstep.__version__


def test_constraints_pin_every_dependency_exactly_and_without_a_local_suffix() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pinned = {line.split("==")[0].lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d
        for extra in ("s3", "wandb", "tensorboard", "examples", "test")
        for d in project["optional-dependencies"][extra]
    ]
    names = {re.split(r"[^A-Za-z0-9_.-]", dependency)[0].lower() for dependency in wanted} - {"everstep"}
    assert names <= pinned


@pytest.mark.parametrize("name", ["build", "demo", "image", "test"])
def test_6_1_a_lock_has_a_hash_for_each_package_its_versions_are_the_constraints_and_torch_is_in_none(
    name: str,
) -> None:
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / f"{name}.txt").read_text().strip())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    locked = {found[1].lower(): found[2] for entry in entries if (found := re.match(r"(\S+?)==(\S+)", entry))}
    assert len(locked) >= len(entries) - 1  # one package has two versions, by Python
    constraints = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {key.lower(): version for key, _, version in (line.partition("==") for line in constraints)}
    assert {key: locked[key] for key in locked.keys() & pinned.keys()}.items() <= pinned.items()
    without_kernels = {"nvidia-ml-py", "torchmetrics"}
    assert not [key for key in locked.keys() - without_kernels if key.startswith(("torch", "nvidia", "triton"))]


def test_6_1_the_lock_of_the_tests_has_all_that_the_extras_name() -> None:
    text = (ROOT / "requirements" / "test.txt").read_text()
    locked = {line.split("==")[0].lower() for line in text.splitlines() if line[:1].isalnum()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [each for extra in project["optional-dependencies"].values() for each in extra]
    names = {re.split(r"[^A-Za-z0-9_.-]", each)[0].lower().replace("_", "-") for each in wanted}
    assert names - {"everstep", "torch"} <= {name.replace("_", "-") for name in locked}


def test_6_5_each_package_of_the_azure_server_is_held_to_a_hash() -> None:
    lock = json.loads((ROOT / "tests/support/azurite/package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages["node_modules/azurite"]["version"] == "3.37.0"
    assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())
    assert "npm ci" in (ROOT / ".ci/run").read_text()
