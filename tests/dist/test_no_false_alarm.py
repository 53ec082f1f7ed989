"""Long waits that are no hangs: the watchdog gives no alarm. A rank that is only slow is named, no more."""

from __future__ import annotations

import io
import os
import pdb
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.outcome import Outcome
from everstep.trainer.reporting.sinks import read_lines
from everstep.trainer.watchdog import watchdog
from everstep.trainer.watchdog.evidence import process_facts
from everstep.trainer.watchdog.straggler import StragglerSearch
from everstep.trainer.watchdog.watchdog import LATER_S
from support import hangs, toy
from support.processes import until
from support.ranks import folder, train

pytestmark = pytest.mark.dist

SHORT_S, STALL_S, PASS = 1.5, 2.0, 12
FIRST_SHAPE = 1
"""Compilations for the first shape."""


def assert_no_alarm(root: Path, *words: str, world: int = 2, **options: object) -> None:
    ended = train(world, root, f"stop.stall_s={SHORT_S}", *words, **options)  # type: ignore[arg-type]
    assert ended.codes == [0] * world, ended.printed
    ending = folder(root).last_ending()
    assert ending is not None
    assert ending.outcome is Outcome.done
    assert not list((root / "toy/attempts/0001").glob("stall-*"))


def test_no_alarm_for_a_slow_first_batch_or_a_compiler(tmp_path: Path) -> None:
    assert_no_alarm(tmp_path, before=hangs.in_pass(2, hangs.now_and_then(3 * SHORT_S)))


def test_no_alarm_when_a_new_shape_is_compiled(tmp_path: Path) -> None:
    def lay(rank: int) -> None:
        compiled = iter(range(1, 10**6))

        def slow(module: Any, inputs: object) -> Any:
            if next(compiled) > FIRST_SHAPE:
                time.sleep(1.3 * SHORT_S)
            return module.forward

        torch._dynamo.register_backend(slow, name="slow")

    # Of each 7 samples the last microbatch holds one alone, which is another shape.
    assert_no_alarm(tmp_path, "parallel.compile=slow", "steps=3", "evaluate.every=null", before=lay)


def test_no_alarm_in_a_slow_evaluation(tmp_path: Path) -> None:
    def lay(rank: int) -> None:
        original = toy.ToyTask.evaluate

        def slow(*args: object) -> object:
            time.sleep(0.5 * SHORT_S)
            return original(*args)  # type: ignore[arg-type]

        toy.ToyTask.evaluate = slow  # type: ignore[assignment, method-assign]

    assert_no_alarm(tmp_path, "evaluate.batch=2", before=lay)


def test_no_alarm_while_a_save_waits_for_a_store_that_hangs(tmp_path: Path) -> None:
    from everstep.trainer.checkpoint.run_folder_target import RunFolderTarget

    def lay(rank: int) -> None:
        hangs.before(RunFolderTarget, "commit", 2, hangs.now_and_then(3 * SHORT_S))

    assert_no_alarm(tmp_path, before=lay)


@pytest.mark.parametrize("world", [1, 2])
def test_no_alarm_when_the_whole_job_was_suspended(tmp_path: Path, world: int) -> None:
    def resume(pids: list[int]) -> None:
        until(lambda: all(process_facts(pid)["state"] == "T" for pid in pids), 60)
        time.sleep(SHORT_S + LATER_S + 1.0)  # longer than the kernel's timer
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    assert_no_alarm(tmp_path, world=world, before=hangs.in_pass(PASS, hangs.stop, range(world)), meanwhile=resume)


def test_no_alarm_when_the_wall_clock_is_stepped(tmp_path: Path) -> None:
    def step() -> None:
        real = time.time
        time.time = lambda: real() + 3600.0

    assert_no_alarm(tmp_path, before=hangs.in_pass(PASS, step, [0, 1]))


def test_no_alarm_in_a_debugger(tmp_path: Path) -> None:
    class Person:
        def readline(self) -> str:
            time.sleep(3 * SHORT_S)
            return "c\n"

    def debug() -> None:
        pdb.Pdb(stdin=Person(), stdout=io.StringIO(), nosigint=True).set_trace()  # type: ignore[arg-type]

    assert_no_alarm(tmp_path, world=1, before=hangs.in_pass(PASS, debug, [0]))


def test_no_alarm_for_a_hook_that_only_rank_0_runs(tmp_path: Path) -> None:
    hook = "hooks=[{_target_: support.toy.slow_hook, seconds: 1.0, step: 7}]"
    assert_no_alarm(tmp_path, hook)


def test_the_watchdog_can_be_switched_off(tmp_path: Path) -> None:
    def look() -> None:
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}

    assert train(2, tmp_path, "stop.stall_s=null", before=hangs.in_pass(PASS, look)).codes == [0, 0]


def slow_in_loss(rank: int) -> None:
    """Rank 1 is slow outside of the model."""
    add_delay(toy.ToyTask, "loss", 0.03 if rank == 1 else 0.0)


def slow_in_block(rank: int) -> None:
    """Rank 1 is slow within each of the model's units, which the other ranks see in their gathers."""
    add_delay(toy.Block, "forward", 0.02 if rank == 1 else 0.001)


def slow_in_data(rank: int) -> None:
    add_delay(toy, "uniform", 0.06 if rank == 1 else 0.0)  # less is lost in the noise of a busy machine


def equally_slow(rank: int) -> None:
    add_delay(toy.Block, "forward", 0.01)


def add_delay(owner: Any, method: str, seconds: float) -> None:
    original = getattr(owner, method)

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return original(*args)

    setattr(owner, method, slow)


def named_ranks(root: Path, lay: Callable[[int], None], *words: str, world: int = 3) -> list[int]:
    """Train with small windows; return the ranks that are named in events."""

    def before(rank: int) -> None:
        watchdog.StragglerSearch = partial(StragglerSearch, window_steps=5, window_s=0.3)  # type: ignore[misc, assignment]
        lay(rank)

    ended = train(world, root, "steps=60", "evaluate.every=null", f"stop.stall_s={STALL_S}", *words, before=before)
    assert ended.codes == [0] * world, ended.printed
    events = read_lines(folder(root), "events.jsonl")
    return [event["rank"] for event in events if event["event"] == "straggler"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("lay", [slow_in_loss, slow_in_block, slow_in_data])
def test_a_slow_rank_is_named_in_an_event_and_in_the_status_and_nothing_else_happens(
    tmp_path: Path, lay: Callable[[int], None], kind: str
) -> None:
    assert named_ranks(tmp_path, lay, f"parallel={kind}") == [1]
    assert "rank 1 on " in folder(tmp_path).facts("progress.json")["straggler"]


def test_a_slow_rank_is_named_where_shards_are_replicated(tmp_path: Path) -> None:
    assert named_ranks(tmp_path, slow_in_block, "parallel=hsdp", "parallel.shard=2", world=4) == [1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_no_rank_is_named_where_all_are_equally_slow(tmp_path: Path, kind: str) -> None:
    assert named_ranks(tmp_path, equally_slow, f"parallel={kind}") == []
