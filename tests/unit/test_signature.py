"""Signed manifests: with a key in the environment, what another key (or none) has signed is not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from everstep.errors import CheckpointError
from everstep.run_folder import MANIFEST, RunFolder
from everstep.security.signing import KEY
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import Committed, candidates, was_set_aside
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.command import verb
from support.saved_checkpoint import saved

SECRET = "planted-secret-3f1c"


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, Checkpointer, str]:
    monkeypatch.setenv(KEY, SECRET)
    run = RunFolder(str(tmp_path / "run"))
    return run, *saved(run)


def change(run: RunFolder, path: str, **fields: object) -> None:
    tree = json.loads(run.storage.read(f"{path}/{MANIFEST}"))
    run.storage.write(f"{path}/{MANIFEST}", json.dumps({**tree, **fields}).encode())


def test_what_was_signed_with_the_same_key_is_read(signed: tuple[RunFolder, Checkpointer, str]) -> None:
    run, checkpoints, path = signed
    assert checkpoints.restore() is not None
    assert locate(run.url)[1] == path


@pytest.mark.parametrize(
    ("key", "fields", "said"),
    [
        ("another", {}, "signed with another"),
        (SECRET, {"samples": 3}, "it was changed"),
        (SECRET, {"signature": ""}, "it is not signed"),
        (SECRET, {"signature": "00"}, "its signature is of another version"),
    ],
)
def test_what_was_not_is_neither_read_nor_set_aside(
    signed: tuple[RunFolder, Checkpointer, str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    fields: dict[str, object],
    said: str,
) -> None:
    run, checkpoints, path = signed
    change(run, path, **fields)
    monkeypatch.setenv(KEY, key)
    for read in (checkpoints.restore, lambda: locate(run.url), lambda: locate(f"{run.url}/{path}")):
        with pytest.raises(CheckpointError, match=said) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert was_set_aside(run) == []


def test_without_a_key_signatures_are_not_asked_for(
    signed: tuple[RunFolder, Checkpointer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, checkpoints, _ = signed
    monkeypatch.delenv(KEY)
    assert checkpoints.restore() is not None
    assert [type(found) for found in candidates(run)] == [Committed]


def test_the_key_is_in_no_file(signed: tuple[RunFolder, Checkpointer, str], tmp_path: Path) -> None:
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


# -------------------------------------------------------------------------------------------- export and diff


def test_a_checkpoint_is_exported_to_what_everybody_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    target = tmp_path / "out" / "weights.safetensors"
    assert verb(["checkpoint", "export", run.url, str(target)]) == 0
    assert f"2 tensors of {run.url}/{path}" in capsys.readouterr().out
    found = safetensors.load_file(target)
    assert found.keys() == {"weight", "bias"}
    for name, value in checkpoints.state.model.state_dict().items():
        assert torch.equal(found[name], value)
    assert [p.name for p in target.parent.iterdir()] == ["weights.safetensors"]
    for typed, said in (([], "is there already"), (["--weights", "ema"], "has no moving average")):
        to = target if not typed else tmp_path / "other"
        assert verb(["checkpoint", "export", run.url, str(to), *typed]) == 2
        assert said in capsys.readouterr().err


def test_a_difference_is_told_by_size_and_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = RunFolder(str(tmp_path / "one")), RunFolder(str(tmp_path / "other"))
    saved(one)
    checkpoints, _ = saved(other)
    checkpoints.state.progress.step = 5
    with torch.no_grad():
        checkpoints.state.model.weight[0, 0] += 0.5  # type: ignore[operator, index]
        checkpoints.state.model.bias *= 2  # type: ignore[operator]
    assert checkpoints.save()
    assert checkpoints.finish()
    assert verb(["checkpoint", "diff", one.url, other.url]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "2 tensors differ"
    assert "model.bias: 2 of 2 elements" in said[0]
    assert said[0].endswith("cosine 1")
    assert "model.weight: 1 of 6 elements, at most 0.5 apart, cosine 0." in said[1]
