"""Stopping well: whoever asks, the run saves, says `preempted`, and goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.outcome import Outcome
from everstep.run_folder import STOP_MARKER
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.data.loader import Loader
from everstep.trainer.evaluate import Evaluator
from everstep.trainer.step import Stepper
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist


def as_it_begins(owner: type, method: str, number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A trap on rank 1: `act` as the `number`-th call begins."""

    def lay(rank: int) -> None:
        original, calls = getattr(owner, method), iter(range(1, 10**6))

        def trapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                act()
            return original(*args, **kwargs)

        if rank == 1:
            setattr(owner, method, trapped)

    return lay


def raise_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(2, root).codes == [0, 0]
    return root


def assert_stopped_and_goes_on(root: Path, undisturbed: Path, codes: list[int], printed: str) -> None:
    assert codes == [75, 75], printed
    ending = folder(root).last_ending()
    assert ending is not None
    assert ending.outcome is Outcome.preempted
    assert locate(folder(root).url)[1].startswith(f"checkpoints/step-{ending.step:08d}")
    assert train(2, root).codes == [0, 0]
    assert ledger(root) == ledger(undisturbed)
    assert list(differences(locate(folder(root).url), locate(folder(undisturbed).url))) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(undisturbed: Path, tmp_path: Path, number: int) -> None:
    ended = train(2, tmp_path, before=as_it_begins(Stepper, "__call__", 6, raise_signal(number)))
    assert_stopped_and_goes_on(tmp_path, undisturbed, ended.codes, ended.printed)


@pytest.mark.parametrize(
    ("owner", "method", "number"),
    [
        (Evaluator, "__call__", 1),
        (Checkpointer, "save", 2),
        (Checkpointer, "restore", 1),
        (Stepper, "rehearse", 1),
        (Loader, "_spans", 1),
    ],
    ids=["evaluation", "save", "restore", "first pass (compilation)", "data"],
)
def test_a_stop_is_honoured_in_every_phase(
    undisturbed: Path, tmp_path: Path, owner: type, method: str, number: int
) -> None:
    ended = train(2, tmp_path, before=as_it_begins(owner, method, number, raise_signal(signal.SIGTERM)))
    assert_stopped_and_goes_on(tmp_path, undisturbed, ended.codes, ended.printed)


def test_an_evaluation_that_was_cut_short_is_made_up_for(undisturbed: Path, tmp_path: Path) -> None:
    from everstep.trainer.reporting.sinks import read_metrics

    train(2, tmp_path, before=as_it_begins(Evaluator, "__call__", 1, raise_signal(signal.SIGTERM)))
    assert read_metrics(folder(tmp_path), "evaluate") == {}
    train(2, tmp_path)
    made_up, whole = (read_metrics(folder(root), "evaluate") for root in (tmp_path, undisturbed))
    assert {step: r["mae"] for step, r in made_up.items()} == {step: r["mae"] for step, r in whole.items()}


def test_the_stop_marker_in_the_run_folder_stops_the_run(undisturbed: Path, tmp_path: Path) -> None:
    def mark_and_wait() -> None:
        marker = tmp_path / "toy" / STOP_MARKER
        marker.write_text("the test")
        time.sleep(0.3)  # the step that the other rank's watcher sees the marker in

    ended = train(2, tmp_path, "stop.poll_s=0.05", before=as_it_begins(Stepper, "__call__", 5, mark_and_wait))
    assert not (tmp_path / "toy" / STOP_MARKER).exists()
    assert_stopped_and_goes_on(tmp_path, undisturbed, ended.codes, ended.printed)


def test_the_wall_time_budget_stops_the_run(undisturbed: Path, tmp_path: Path) -> None:
    ended = train(2, tmp_path, "stop.wall_time_s=0.01")
    assert_stopped_and_goes_on(tmp_path, undisturbed, ended.codes, ended.printed)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    ended = train(2, tmp_path, before=as_it_begins(Stepper, "__call__", 6, twice))
    assert ended.codes[1] == 130


@pytest.mark.parametrize("workers", [0, 2])
def test_data_workers_outlive_the_signal_until_the_run_has_saved(
    undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    """torchrun and schedulers signal the whole process group, workers included."""

    def lay(rank: int) -> None:
        os.setpgid(0, 0)
        as_it_begins(Stepper, "__call__", 6, lambda: os.killpg(os.getpgid(0), signal.SIGTERM))(rank)

    ended = train(2, tmp_path, f"loader.workers={workers}", "loader.prefetch=2", before=lay)
    assert_stopped_and_goes_on(tmp_path, undisturbed, ended.codes, ended.printed)
