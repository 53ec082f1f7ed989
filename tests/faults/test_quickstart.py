"""What the README promises a newcomer: the example project trains, and the commands in the pages are sound."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.compose import compose
from everstep.trainer.reporting.sinks import read_metrics
from support import TESTS
from support.ranks import folder

pytestmark = pytest.mark.process
ROOT = TESTS.parent
PAGES = ["README.md", *(f"examples/{name}/README.md" for name in ("quickstart", "nanogpt", "bert_lora", "cnn"))]


def environment(*path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example project as pip installs it, in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(target), str(ROOT / "examples/quickstart")],
        check=True,
    )  # fmt: skip
    return target


def test_the_example_project_installs_trains_and_learns(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "everstep.launch", "run", "--config-dir", str(ROOT / "examples/quickstart/conf"),
               "experiment=quickstart", "plugins=[quickstart]", "run=toy", f"run_root={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, env=environment(ROOT, installed), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(read_metrics(folder(tmp_path), "evaluate").values())[-1]["accuracy"] > 0.9


def test_a_package_that_was_not_named_is_refused(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "everstep.launch", "run", "--config-dir", str(ROOT / "examples/quickstart/conf"),
               "experiment=quickstart", "run=toy", f"run_root={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, env=environment(ROOT, installed), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "plugins=[quickstart]" in done.stderr
    assert "Traceback" not in done.stderr


def commands(page: str) -> list[list[str]]:
    """The everstep and torchrun commands in the indented or fenced blocks of a page, without their comments."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:    |)((?:everstep|torchrun) .*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_run_command_in_the_pages_composes(page: str) -> None:
    for words in commands(page):
        overrides = [word for word in words if re.match(r"^[a-z_.]+=", word)]
        if "run" in words[1:2] or "everstep.trainer" in words:
            folder = "examples/quickstart" if page == "README.md" else str(Path(page).parent)
            own = [str(ROOT / folder / "conf")] if "--config-dir" in words else []
            assert compose(overrides, own).run.steps > 0, words


def test_the_readme_shows_the_tree_as_it_is() -> None:
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## The tree.*?```\n(.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), line
        else:
            assert (ROOT / folder / name).exists(), line


def test_the_links_in_the_pages_lead_somewhere() -> None:
    pages = [*PAGES, "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_first_command_after_the_demo_finds_everstep() -> None:
    text = (ROOT / "README.md").read_text()
    after = text[text.index("Now break it.") :]
    activate, first = re.findall(r"^    (\S.*)$", after, flags=re.MULTILINE)[:2]
    assert activate.split("#")[0].strip() == "source .venv/bin/activate"
    assert first.startswith("everstep run ")
    assert "source $(BIN)/activate" in (ROOT / "Makefile").read_text()


def test_what_is_said_to_resume_a_run_names_it() -> None:
    text = (ROOT / "examples/quickstart/README.md").read_text()
    [start] = [words for words in commands("examples/quickstart/README.md") if "run=wine" in words]
    assert text.index(" ".join(start)) < text.index("give the same command again")
    helped = subprocess.run(
        [sys.executable, "-m", "everstep.launch", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    [resumes] = [line for line in helped.splitlines() if "resumes" in line and "everstep run" in line]
    assert "run=demo" in resumes
