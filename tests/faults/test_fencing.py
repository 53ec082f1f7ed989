"""One writer: of two starts on one run folder the later one owns it, and the earlier can commit nothing more."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.manifest import candidates
from everstep.trainer.step import Stepper
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist


def wait_for(condition, deadline_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def freeze_at(step: int, gate: Path):  # type: ignore[no-untyped-def]
    """A trap: the process stands still at a step, as behind a cut network, until the gate file is there."""

    def lay(rank: int) -> None:
        original = Stepper.__call__

        def held(self, batches) -> None:  # type: ignore[no-untyped-def]
            if self.state.progress.step + 1 == step:
                wait_for(gate.exists)
            original(self, batches)

        Stepper.__call__ = held  # type: ignore[method-assign]

    return lay


def test_a_start_that_was_overtaken_stops_at_its_next_save_and_harms_nothing(tmp_path: Path) -> None:
    gate, undisturbed = tmp_path / "gate", tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert train(1, undisturbed).codes == [0]
    first = os.fork()
    if first == 0:
        ended = train(1, tmp_path, before=freeze_at(7, gate))
        os._exit(ended.codes[0])
    try:
        run = folder(tmp_path)
        wait_for(lambda: any(True for _ in candidates(run)))
        assert train(1, tmp_path).codes == [0]
        committed = [(c.step, c.attempt) for c in candidates(run)]
        gate.touch()
        _, status = os.waitpid(first, 0)
    except BaseException:
        os.kill(first, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == Outcome.superseded.exit_code
    ending = run.ending(1)
    assert ending is not None
    assert ending.outcome is Outcome.superseded
    assert [(c.step, c.attempt) for c in candidates(run)] == committed
    assert ledger(tmp_path) == ledger(undisturbed)


def test_a_commit_that_comes_late_from_an_overtaken_start_does_not_count(tmp_path: Path) -> None:
    """Cut off between its last look and its commit, a writer can still write: nobody will read it."""
    assert train(1, tmp_path, "steps=8", "checkpoint.keep_last=9").codes == [0]
    run = RunFolder(str(tmp_path / "toy"))
    number = run.claim({})
    run.record_restored(number, 4, 1)
    assert [(c.step, c.attempt) for c in candidates(run)] == [(4, 1)]
    assert train(1, tmp_path, "steps=12", "checkpoint.keep_last=9").codes == [0]
    restored = json.loads((tmp_path / f"toy/attempts/{number + 1:04d}/restored.json").read_text())
    assert restored == {"step": 4, "attempt": 1}
