"""With a key set, a checkpoint counts for the run, the config and the moment that it was signed for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from everstep.config import RunConfig
from everstep.errors import CheckpointError, ConfigError
from everstep.frozen_config import fixed_digest, settle
from everstep.run_folder import MANIFEST, RUN_ID, RunFolder
from everstep.run_id import ensure_run_id, run_id
from everstep.security.signing import KEY, Ed25519Key
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import FORMAT
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.signature import Binding
from everstep.trainer.checkpoint.signed_head import HEAD
from everstep.trainer.command import verb
from support.saved_checkpoint import saved

SEED = "11" * 32
KEYS = {"blake3": "k1", "ed25519": f"ed25519:{SEED}"}


@pytest.fixture(params=KEYS)
def key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY, KEYS[request.param])
    return str(request.param)


def run_in(folder: Path, steps: tuple[int, ...] = (4, 8)) -> tuple[RunFolder, Checkpointer, list[str]]:
    """A run with signed checkpoints of these steps."""
    run = RunFolder(str(folder))
    ensure_run_id(run)
    checkpoints, path = saved(run)
    for step in steps[1:]:
        checkpoints.state.progress.step = step
        assert checkpoints.save()
        assert checkpoints.finish()
    return run, checkpoints, [path.replace("00000004", f"{step:08d}") for step in steps]


def refusal(checkpoints: Checkpointer) -> str:
    with pytest.raises(CheckpointError) as refused:
        checkpoints.restore()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_signed_run_is_read_and_its_newest_checkpoint_is_beyond_doubt(tmp_path: Path, key: str) -> None:
    run, checkpoints, paths = run_in(tmp_path / "run")
    restored = checkpoints.restore()
    assert restored is not None
    assert (restored.step, restored.why) == (8, "the newest")
    assert locate(run.url)[1] == paths[-1]
    tree = json.loads(run.storage.read(f"{paths[-1]}/{MANIFEST}"))
    assert tree["format"] == FORMAT
    assert tree["signature"].split(":")[:4] == ["v2", run_id(run), "-", key]


def test_a_checkpoint_of_another_run_is_refused_under_this_name(tmp_path: Path, key: str) -> None:
    run, checkpoints, paths = run_in(tmp_path / "run")
    other, _, _ = run_in(tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / paths[-1])
    shutil.copytree(tmp_path / "other" / paths[-1], tmp_path / "run" / paths[-1])
    assert "signed for another run" in refusal(checkpoints)
    with pytest.raises(CheckpointError, match="signed for another run"):
        locate(run.url)
    assert verb(["checkpoint", "verify", run.url]) == 1
    assert verb(["checkpoint", "verify", other.url]) == 0


def test_an_older_checkpoint_is_not_taken_for_the_newest_without_a_word(tmp_path: Path, key: str) -> None:
    run, checkpoints, paths = run_in(tmp_path / "run")
    head = run.storage.read(HEAD)
    shutil.rmtree(tmp_path / "run" / paths[-1])
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.why == "the newest; but step 8 of attempt 1 was saved after it, and is gone"
    other, _, _ = run_in(tmp_path / "other")
    changed = json.dumps({**json.loads(head), "step": 4}).encode()
    for content in (changed, other.storage.read(HEAD), b"{}", b"[" * 10**5):
        run.storage.write(HEAD, content)
        restored = checkpoints.restore()
        assert restored is not None
        assert "head.json" in restored.why
    run.storage.delete(HEAD)
    restored = checkpoints.restore()
    assert restored is not None
    assert "head.json is missing: newer ones may have been removed" in restored.why


def test_another_config_is_refused_unless_the_run_allows_changes_and_then_said(tmp_path: Path, key: str) -> None:
    _, checkpoints, _ = run_in(tmp_path / "run")
    restorer = checkpoints._restorer
    restorer.facts = replace(restorer.facts, binding=replace(restorer.facts.binding, config="changed"))
    assert "signed for another config" in refusal(checkpoints)
    restorer.facts = replace(restorer.facts, binding=replace(restorer.facts.binding, may_differ=True))
    restored = checkpoints.restore()
    assert restored is not None
    assert "; but it was signed for another config" in restored.why


def test_the_fixed_part_of_a_config_is_what_a_resume_may_not_change() -> None:
    run = RunConfig(run="a", optimizer={"_target_": "torch.optim.SGD", "lr": 0.1})
    longer = replace(run, steps=run.steps + 5, run_root="elsewhere", plugins=["mine"])
    assert fixed_digest(longer) == fixed_digest(run)
    for other in (
        replace(run, optimizer={"_target_": "torch.optim.SGD", "lr": 10.0}),
        replace(run, seed=run.seed + 1),
        replace(run, run="b"),
    ):
        assert fixed_digest(other) != fixed_digest(run)


def test_a_run_gets_its_id_with_its_config_and_keeps_it(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    settle(RunConfig(run="run"), run)
    first = run.storage.read(RUN_ID)
    settle(RunConfig(run="run", steps=9999), run)
    assert run.storage.read(RUN_ID) == first
    run.storage.write(RUN_ID, b"../x")
    with pytest.raises(CheckpointError, match="run_id is damaged"):
        run_id(run)


def test_a_signature_that_binds_to_no_run_is_refused(tmp_path: Path, key: str) -> None:
    run, checkpoints, paths = run_in(tmp_path / "run", (4,))
    tree = json.loads(run.storage.read(f"{paths[0]}/{MANIFEST}"))
    for signature in ("0" * 64, "v2:a:b", "v3:a:b:c:d", ":" * 9):
        run.storage.write(f"{paths[0]}/{MANIFEST}", json.dumps({**tree, "signature": signature}).encode())
        assert "its signature is of another version" in refusal(checkpoints)


def test_a_public_key_reads_and_does_not_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, KEYS["ed25519"])
    run, checkpoints, paths = run_in(tmp_path / "run")
    public = Ed25519Key(KEYS["ed25519"])._public.public_bytes_raw().hex()
    monkeypatch.setenv(KEY, f"ed25519-public:{public}")
    assert locate(run.url)[1] == paths[-1]
    assert checkpoints.restore() is not None
    checkpoints.state.progress.step = 12
    checkpoints.save()
    assert not checkpoints.finish()
    assert "is a public key" in checkpoints.finished_saves[-1].error
    monkeypatch.setenv(KEY, "ed25519-public:" + "22" * 32)
    assert "signed with another" in refusal(checkpoints)
    monkeypatch.setenv(KEY, "ed25519:zz")
    with pytest.raises(ConfigError, match="is no key of ed25519: write"):
        checkpoints.restore()


def test_without_a_key_there_is_no_signature_no_head_and_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    run, checkpoints, paths = run_in(tmp_path / "run")
    assert json.loads(run.storage.read(f"{paths[0]}/{MANIFEST}"))["signature"] == ""
    assert not run.storage.exists(HEAD)
    checkpoints._restorer.facts = replace(checkpoints._restorer.facts, binding=Binding("other", "other"))
    assert checkpoints.restore() is not None
