"""`init_from=registry://…`: a run from a version of a registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from everstep.registry.registry import Registry
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]

MINE = ("experiment=breast_cancer", "steps=2", "evaluate.every=null")


def everstep(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "everstep.launch", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, and a registry whose version 1 has weights and whose version 2 is a graph."""
    root = tmp_path_factory.mktemp("models")
    for words in (
        ("run", *MINE, "seed=7", "run=first", "job.nproc=1"),
        ("export", "first", "--format", "safetensors", "--out", "weights"),
        ("export", "first", "--format", "pt2", "--out", "graph"),
        ("registry", "add", "models", "cells", "weights"),
        ("registry", "add", "models", "cells", "graph"),
        ("registry", "promote", "models", "cells@1", "--to", "prod"),
    ):
        ended = everstep(*words, cwd=root)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return root


@pytest.mark.parametrize("place", [("job.nproc=1",), ("parallel=fsdp", "job.nproc=2")], ids=["one", "fsdp"])
def test_a_run_from_a_version_is_one_from_its_export_and_leaves_no_copy(trained: Path, place: tuple[str, ...]) -> None:
    kind = place[0].partition("=")[2]
    for name, origin in (("folder", "weights"), ("version", "registry://models/cells@1")):
        ended = everstep("run", *MINE, *place, f"init_from={origin}", f"run={name}-{kind}", cwd=trained)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    found = [locate(str(trained / f"runs/{name}-{kind}")) for name in ("folder", "version")]
    assert list(differences(*found)) == []
    assert list(Path(tempfile.gettempdir()).glob("everstep-init-*")) == []
    assert "init_from: registry://models/cells@1" in (trained / f"runs/version-{kind}/config.yaml").read_text()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models/cells@prod", "it is version 1 now: write init_from=registry://models/cells@1"),
        ("models/cells", "it is version 2 now"),
        ("models/cells@2", "it was exported as pt2, which has no weights by name"),
        ("models/cells@9", "cells@9: models has no such version; there are 1, 2"),
        ("models/sells@1", "did you mean 'cells'?"),
        ("cells@1", "write registry://URL/MODEL@7"),
    ],
)
def test_what_is_no_version_with_weights_is_one_line(trained: Path, address: str, said: str) -> None:
    ended = everstep("run", *MINE, f"init_from=registry://{address}", "run=refused", "job.nproc=1", cwd=trained)
    assert ended.returncode == 2
    assert said in ended.stdout + ended.stderr


def test_a_changed_file_is_refused_before_it_is_read(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "models", tmp_path / "models")
    version = Registry(str(tmp_path / "models")).version("cells", 1)
    (weights,) = (tmp_path / "models/cells/files" / version.digest).glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    words = (*MINE, f"init_from=registry://{tmp_path}/models/cells@1", "run=damaged", "job.nproc=1")
    ended = everstep("run", *words, cwd=tmp_path)
    assert ended.returncode == 2
    assert "is not the file that was added (BLAKE3); nothing of it was used" in ended.stdout + ended.stderr
    assert json.loads((tmp_path / "runs/damaged/attempts/0001/outcome.json").read_text())["step"] == 0
