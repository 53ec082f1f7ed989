"""What k8s/Dockerfile copies is what pyproject.toml installs, and .dockerignore lets it through, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import everstep

ROOT = Path(everstep.__file__).parent.parent
DOCKERFILE = ROOT / "k8s" / "Dockerfile"
pytestmark = pytest.mark.skipif(not DOCKERFILE.exists(), reason="these tests read a checkout")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def stage(name: str) -> str:
    """The instructions of a stage; the last has no name."""
    stages = re.split(r"(?m)^FROM ", re.sub(r"\\\n", " ", DOCKERFILE.read_text()))
    return next(text for text in stages[1:] if text.splitlines()[0].partition(" AS ")[2] == name)


def copied(instructions: str) -> set[str]:
    """What comes of the checkout."""
    lines = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", instructions)
    return {name for line in lines for name in line.split()}


def test_every_folder_that_is_installed_is_copied() -> None:
    folders = {"everstep"} | {path.name for path in (ROOT / "everstep").iterdir() if path.is_symlink()}
    project = pyproject()["project"]
    assert copied(stage("everstep")) == folders | {
        "pyproject.toml", "requirements", project["readme"], *project["license-files"],
    }  # fmt: skip


def test_dockerignore_lets_through_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == copied(stage("everstep")) | copied(stage(""))
    assert lines[-1] == "**/__pycache__"  # the last line that fits has the last word


def test_packages_are_installed_before_the_code_comes() -> None:
    """Else each change of the code would install torch again."""
    last = stage("")
    torch, packages, code = (last.index(text) for text in ("^torch==", "-r requirements/image.txt", "--from=everstep"))
    assert torch < packages < code
    assert copied(last) == {"constraints.txt", "requirements"}


def test_6_2_each_package_of_the_image_but_torch_is_held_to_a_hash() -> None:
    installs = re.findall(r"pip install (.+?)(?= && |\n|$)", re.sub(r"\s*\\\n\s*", " ", DOCKERFILE.read_text()))
    without = [words for words in installs if "--require-hashes" not in words]
    assert [words.split()[0] for words in without] == ["--no-deps", "--index-url"]  # Everstep itself, and torch


def test_the_extras_of_the_image_are_extras_of_everstep() -> None:
    (extras,) = re.findall(r"(?m)^IMAGE_EXTRAS \?= (.+)$", (ROOT / "Makefile").read_text())
    assert set(extras.split(",")) <= set(pyproject()["project"]["optional-dependencies"])
    assert "examples" in extras.split(",")  # the data sets of conf/


def test_6_2_the_image_runs_as_the_user_of_a_pod() -> None:
    assert re.findall(r"(?m)^USER (.+)$", DOCKERFILE.read_text()) == ["1000:1000"]
