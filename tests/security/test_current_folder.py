"""A verb that is called in a folder from elsewhere imports no module that lies there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import TESTS
from support.users_project import OWN, lay_out

TRAP = "open({mark!r}, 'a').write('ran'); raise SystemExit('a file of the current folder was run')\n"
MODULES = ("json", "torch", "numpy", "yaml", "hydra", "blake3", "pyarrow", "sitecustomize")
SMALL = ("experiment=breast_cancer", "steps=2", "evaluate.every=null", "run=demo")

pytestmark = pytest.mark.process


def everstep(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `everstep` as its script does: without the current folder on the path."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-P", "-m", "everstep.launch", *words]
    return subprocess.run(argv, cwd=where, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "from_elsewhere"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(TRAP.format(mark=str(tmp_path / "mark")))
    return folder


@pytest.mark.parametrize("words", [
    ("run", *SMALL, "job.nproc=1"),
    ("run", *SMALL, "job.nproc=2", "parallel=ddp", "job.warm=false"),
    ("run", *SMALL, "job.nproc=2", "parallel=ddp"),
    ("check", *SMALL),
    ("checkpoint", "ls", "."),
    ("sweep", *SMALL, "optimizer.lr=0.01,0.02", "job.nproc=1"),
])  # fmt: skip
def test_no_module_of_the_current_folder_is_imported(hostile: Path, words: tuple[str, ...]) -> None:
    done = everstep(hostile, *words)
    assert not (hostile.parent / "mark").exists(), done.stderr
    assert done.returncode == 0 or words[0] == "checkpoint", done.stderr


def test_workers_that_prepare_a_dataset_import_none_either(hostile: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (hostile / name).write_text('{"x": 1}\n' * 8)
    done = everstep(hostile, "data", "prepare", "src=*.jsonl", "dst=out", "processes=2")
    assert not (hostile.parent / "mark").exists(), done.stderr
    assert done.returncode == 0, done.stderr


def test_a_plug_in_that_the_user_names_is_found_in_the_current_folder(tmp_path: Path) -> None:
    project = lay_out(tmp_path)
    for words in (("check", *OWN), ("run", *OWN, "run=demo", "job.nproc=1")):
        done = everstep(project, *words)
        assert done.returncode == 0, done.stderr


def test_a_generator_that_the_user_names_is_found_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def rows():\n    for n in range(8):\n        yield {'x': n}\n")
    done = everstep(tmp_path, "data", "prepare", "format=generator", "src=mine:rows", "dst=out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/index.json").read_bytes())["shards"]


@pytest.mark.parametrize("warm", ["true", "false"])
def test_a_script_that_a_plug_in_starts_finds_the_modules_beside_it(tmp_path: Path, warm: str) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/beside.py").write_text("")
    (tmp_path / "tools/tool.py").write_text("import beside\n")
    (tmp_path / "mine.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, 'tools/tool.py'], check=True)\n"
        "def hook(): return lambda info: None\n"
    )
    words = ("plugins=[mine]", "hooks=[{_target_: mine.hook}]", "job.nproc=1", f"job.warm={warm}")
    done = everstep(tmp_path, "run", *SMALL, *words)
    assert done.returncode == 0, done.stderr
