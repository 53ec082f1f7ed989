"""Hangs: the rank that is behind is named with its line, all ranks end, and the run goes on to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from everstep.outcome import Ending, Outcome
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_lines
from everstep.trainer.watchdog import evidence
from support import hangs, toy
from support.processes import alive
from support.ranks import Ranks, folder, ledger, train

pytestmark = pytest.mark.dist

WORLD, STALL_S, PASS = 3, 2.0, 12
BOUND_S = STALL_S + 5.0
HANGS: dict[str, tuple[Callable[[], None], str, str]] = {
    # what rank 1 does: how, the kind of stall, the line that is named
    "stopped": (hangs.stop, "frozen", "in stop"),
    "loops": (hangs.loop, "stalled", "in loop"),
    "sleeps": (hangs.sleep, "stalled", "in sleep"),
    "computes with Python's lock": (hangs.hold_lock_busy, "frozen", "in hold_lock_busy"),
    "blocks with Python's lock": (hangs.hold_lock_blocked, "frozen", "in hold_lock_blocked"),
    "waits in a collective of its own": (hangs.join_alone, "stalled", "in join_alone"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(WORLD, root).codes == [0] * WORLD
    return root


def hang(root: Path, lay: Callable[[int], None], *words: str, world: int = WORLD) -> tuple[Ranks, float]:
    """Train into a hang; return how the ranks ended, and the seconds from the hang to the last rank's end."""
    began = root / "began"

    def before(rank: int) -> None:
        def note(act: Callable[[], None]) -> Callable[[], None]:
            def noted() -> None:
                began.touch()
                act()

            return noted

        original = hangs.before
        hangs.before = lambda owner, method, number, act: original(owner, method, number, note(act))  # type: ignore[assignment]
        lay(rank)

    ended = train(world, root, f"stop.stall_s={STALL_S}", *words, before=before)
    return ended, time.time() - began.stat().st_mtime


def ending_of(root: Path) -> Ending:
    ending = folder(root).last_ending()
    assert ending is not None
    return ending


def assert_named(root: Path, ended: Ranks, seconds: float, ranks: list[int], kind: str, line: str) -> None:
    ending = ending_of(root)
    assert ending.outcome is Outcome.stalled, ended.printed
    assert seconds < BOUND_S, f"all had left after {seconds:.1f} s: {ended.printed}"
    (event,) = (event for event in read_lines(folder(root), "events.jsonl") if event["event"] == "stalled")
    assert [each["rank"] for each in event["culprits"]] == ranks
    assert event["kind"] == kind
    first = event["culprits"][0]
    assert line in first["line"], event
    assert first["phase"] == "forward"
    assert ending.rank == ranks[0]
    assert f"{kind}: rank {ranks[0]} on {ending.node} (pid {first['pid']}, state " in ending.reason
    assert f"error: {ending.reason}; stacks in" in ended.printed
    assert not alive(first["pid"])


def assert_goes_on(root: Path, undisturbed: Path) -> None:
    resumed = train(WORLD, root)
    assert resumed.codes == [0] * WORLD, resumed.printed
    assert ledger(root) == ledger(undisturbed)
    assert list(differences(locate(folder(root).url), locate(folder(undisturbed).url))) == []


@pytest.mark.parametrize("name", HANGS)
def test_a_hung_rank_is_named_and_the_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, name: str
) -> None:
    act, kind, line = HANGS[name]
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, act))
    assert all(ended.codes)
    assert_named(tmp_path, ended, seconds, [1], kind, line)
    stall = next((tmp_path / "toy/attempts/0001").glob("stall-*"))
    assert {f"rank-{rank:04d}.txt" for rank in range(WORLD)} <= {file.name for file in stall.iterdir()}
    assert line in (stall / "rank-0001.txt").read_text()
    assert_goes_on(tmp_path, undisturbed)


def test_a_collective_of_another_size_than_the_others_ends_by_itself(undisturbed: Path, tmp_path: Path) -> None:
    """gloo ends the process: the seventh misbehaviour needs no watchdog, only that it is not in the way."""
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, lambda: dist.all_reduce(torch.zeros(7))))
    assert all(ended.codes)
    assert seconds < BOUND_S
    assert ending_of(tmp_path).outcome is Outcome.crashed
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["stopped", "sleeps"])
def test_the_next_rank_judges_when_the_judge_itself_hangs(undisturbed: Path, tmp_path: Path, name: str) -> None:
    act, kind, line = HANGS[name]
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, act, ranks=[0]))
    assert_named(tmp_path, ended, seconds, [0], kind, line)
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["stopped", "sleeps"])
def test_two_culprits_are_both_named(tmp_path: Path, name: str) -> None:
    act, kind, line = HANGS[name]
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, act, ranks=[0, 1]))
    assert_named(tmp_path, ended, seconds, [0, 1], kind, line)


def test_under_fsdp_where_all_wait_in_the_same_pass_the_stacks_tell_them_apart(tmp_path: Path) -> None:
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, hangs.sleep), "parallel=fsdp")
    assert_named(tmp_path, ended, seconds, [1], "stalled", "in sleep")


def test_under_fsdp_a_rank_in_another_collective_is_found_by_the_flight_record(tmp_path: Path) -> None:
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, hangs.join_alone), "parallel=fsdp")
    assert_named(tmp_path, ended, seconds, [1], "stalled", "in join_alone")


def test_a_rank_that_waits_for_its_data_is_named_with_that_phase(tmp_path: Path) -> None:
    ended, seconds = hang(tmp_path, lambda rank: hangs.before(toy, "uniform", 9, hangs.sleep) if rank == 2 else None)
    ending = ending_of(tmp_path)
    assert ending.outcome is Outcome.stalled, ended.printed
    assert (ending.rank, seconds < BOUND_S) == (2, True)
    assert "waiting for data" in ending.reason


@pytest.mark.parametrize(("name", "code"), [("sleeps", 1), ("computes with Python's lock", -39)])
def test_one_process_judges_itself_and_a_timer_ends_it_where_no_python_runs(
    tmp_path: Path, name: str, code: int
) -> None:
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, HANGS[name][0], ranks=[0]), world=1)
    assert ended.codes == [code], ended.printed
    if code == 1:
        assert_named(tmp_path, ended, seconds, [0], "stalled", "in sleep")
    else:
        assert "in hold_lock_busy" in (tmp_path / "toy/attempts/0001/rank-0000.log").read_text()


def test_a_rank_that_hangs_in_its_own_output_is_reported_all_the_same(tmp_path: Path) -> None:
    ended, seconds = hang(tmp_path, hangs.in_pass(PASS, hangs.print_without_reader, ranks=[0]))
    ending = ending_of(tmp_path)
    assert (ending.outcome, ending.rank) == (Outcome.stalled, 0), ended.printed
    assert seconds < BOUND_S + 2.0
    assert "in print_without_reader" in ending.reason


def test_evidence_that_cannot_be_had_does_not_keep_the_stall_from_being_reported(tmp_path: Path) -> None:
    def lay(rank: int) -> None:
        def fail() -> str:
            raise OSError("no memory for a file")

        evidence.dump_stacks = fail
        hangs.in_pass(PASS, hangs.stop)(rank)

    ended, seconds = hang(tmp_path, lay)
    ending = ending_of(tmp_path)
    assert (ending.outcome, ending.rank, seconds < BOUND_S) == (Outcome.stalled, 1, True), ended.printed
