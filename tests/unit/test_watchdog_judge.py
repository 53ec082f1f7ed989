"""The watchdog's judgement: from heartbeats to the ranks that are named, and what a line about them says."""

from __future__ import annotations

import dataclasses

import pytest

from everstep.trainer.watchdog.activity import Activity, CompiledShapes, Phase
from everstep.trainer.watchdog.evidence import Evidence, Frame, collectives_in, main_frames
from everstep.trainer.watchdog.heartbeat import Heartbeat, Process, limit_of
from everstep.trainer.watchdog.judge import Judge, Kind, Verdict
from everstep.trainer.watchdog.stall_record import stall_of
from everstep.trainer.watchdog.straggler import WINDOWS, StragglerSearch

STALL_S, SILENT_S = 60.0, 4.0
WAITS = Frame("/site-packages/torch/distributed/distributed_c10d.py", 9, "all_reduce")
ACTS = Frame("/home/me/mine.py", 53, "augment")


def beat(rank: int, number: int, age_s: float = 0.0, step: int = 30, phase: Phase = Phase.backward, turn: int = 0,
         **more: object) -> Heartbeat:  # fmt: skip
    process = Process(f"n{rank // 2}", 100 + rank, 99, 1, 2, 3)
    return dataclasses.replace(
        Heartbeat(number, phase, step, turn, age_s, STALL_S, process),
        **more,  # type: ignore[arg-type]
    )


class World:
    """Heartbeats of some ranks as one of them sees them, second by second."""

    def __init__(self, world: int, rank: int = 0) -> None:
        self.judge = Judge(rank, world, STALL_S, SILENT_S)
        self.now = 0.0
        self.numbers = dict.fromkeys(range(world), 0)
        self.facts: dict[int, dict[str, object]] = {rank: {} for rank in range(world)}
        self.read = 0

    def run(self, seconds: float, frozen: tuple[int, ...] = ()) -> Verdict | None:
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            for rank in self.numbers:
                self.numbers[rank] += rank not in frozen
            wanted = self.judge.wanted(self.now)
            self.read = len(wanted)
            beats = {rank: beat(rank, self.numbers[rank], **self.facts[rank]) for rank in wanted}  # type: ignore[arg-type]
            if (verdict := self.judge.see(beats, self.now)) is not None:
                return verdict
        return None


def ranks(verdict: Verdict | None) -> list[int]:
    assert verdict is not None
    return [each.rank for each in verdict.suspects]


def test_a_rank_that_sends_no_heartbeat_is_frozen_and_one_beside_it_ends_it() -> None:
    seen = World(4)
    assert seen.run(STALL_S - 1, frozen=(3,)) is None
    verdict = seen.run(3, frozen=(3,))
    assert verdict is not None
    assert (verdict.kind, ranks(verdict), verdict.suspects[0].witness) == (Kind.frozen, [3], 2)
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_of_ranks_that_live_the_one_that_has_come_least_far_is_named() -> None:
    seen = World(3)
    for rank in range(3):
        seen.facts[rank] = {"age_s": STALL_S + 1}
    seen.facts[2] |= {"phase": Phase.forward}
    verdict = seen.run(1)
    assert verdict is not None
    assert (verdict.kind, ranks(verdict)) == (Kind.stalled, [2])


def test_nobody_is_named_while_one_rank_gets_on() -> None:
    seen = World(3)
    for rank in (0, 1):
        seen.facts[rank] = {"age_s": 10 * STALL_S}
    assert seen.run(100) is None


def test_a_rank_may_take_longer_for_what_it_does_for_the_first_time() -> None:
    seen = World(2)
    seen.facts = {0: {"age_s": 10 * STALL_S}, 1: {"age_s": 10 * STALL_S, "limit_s": 30 * STALL_S}}
    assert seen.run(100) is None


def test_all_equally_far_is_no_ones_fault() -> None:
    seen = World(3)
    for rank in range(3):
        seen.facts[rank] = {"age_s": STALL_S + 1}
    verdict = seen.run(1)
    assert verdict is not None
    assert verdict.kind is Kind.waiting
    stall = stall_of(verdict, {rank: Evidence([WAITS]) for rank in range(3)}, 3)
    assert stall.culprits == []
    assert "all 3 ranks have waited for 61.0 s in step 30" in stall.reason


@pytest.mark.parametrize("other", [
    Evidence([ACTS]),  # computes, while the others wait
    Evidence([WAITS], collectives=(7, "all_reduce [[3]]")),  # has not joined the eighth
    Evidence([WAITS], collectives=(8, "barrier [[1]]")),  # is alone in another collective
])  # fmt: skip
def test_of_ranks_equally_far_stacks_and_collectives_tell_which_one_does_not_wait(other: Evidence) -> None:
    seen = World(3)
    for rank in range(3):
        seen.facts[rank] = {"age_s": STALL_S + 1}
    verdict = seen.run(1)
    assert verdict is not None
    waiting = Evidence([WAITS], collectives=(8, "all_reduce [[3]]"))
    stall = stall_of(verdict, {0: waiting, 1: Evidence.unpack(other.pack()), 2: waiting}, 3)
    assert [each.suspect.rank for each in stall.culprits] == [1]
    assert stall.kind is Kind.stalled


def test_the_next_rank_judges_a_frozen_judge_and_names_what_froze_with_it() -> None:
    seen = World(4, rank=2)
    assert seen.run(STALL_S - 1, frozen=(0, 1, 3)) is None
    verdict = seen.run(4, frozen=(0, 1, 3))
    assert verdict is not None
    assert (verdict.judge, ranks(verdict)) == (2, [0, 1, 3])


def test_a_rank_that_does_not_judge_reads_one_heartbeat() -> None:
    seen = World(512, rank=400)
    seen.run(20)
    assert seen.read == 1
    seen.run(20, frozen=(0, 1))
    assert seen.read == 3
    seen.run(20)
    assert seen.read == 1


def test_who_was_suspended_itself_holds_it_against_nobody() -> None:
    seen = World(3)
    seen.run(5)
    seen.now += 10 * STALL_S
    seen.judge.resume(seen.now)
    assert seen.run(STALL_S - 1, frozen=(1,)) is None


def test_a_rank_that_has_left_is_not_watched() -> None:
    seen = World(3)
    seen.facts[0] = {"has_left": True}
    assert seen.run(2 * STALL_S, frozen=(0,)) is None


def test_the_line_names_node_process_state_phase_step_file_and_line() -> None:
    seen = World(3)
    verdict = seen.run(2 * STALL_S, frozen=(1,))
    assert verdict is not None
    evidence = Evidence([ACTS], {"state": "T"}, mark=(Phase.forward, 31, 2, 62.04))
    assert stall_of(verdict, {1: evidence}, 3).reason == (
        "frozen: rank 1 on n0 (pid 101, state T, stopped by a signal) for 62.0 s in step 31, in the forward pass of "
        "microbatch 2: /home/me/mine.py:53, in augment"
    )


def test_the_first_mark_of_a_phase_has_more_time_and_the_next_one_has_not() -> None:
    activity = Activity()
    limits = []
    for step in (1, 2):
        activity.at(Phase.forward, step)
        limits.append(limit_of(activity.mark, STALL_S))
    activity.at(Phase.forward, 3, fresh=True)
    assert [*limits, limit_of(activity.mark, STALL_S)] == [30 * STALL_S, STALL_S, 30 * STALL_S]
    activity.at(Phase.save, 3)
    turns = []
    for _ in range(3):
        activity.tick()
        turns.append(activity.mark.turn)
    assert turns == [1, 2, 3]


def test_only_a_compiled_model_has_new_shapes() -> None:
    import torch

    shapes = CompiledShapes(compiles=True)
    assert [shapes.is_new({"x": torch.zeros(size)}) for size in (2, 2, 3, 2)] == [True, False, True, False]
    assert not CompiledShapes(compiles=False).is_new({"x": torch.zeros(2)})


def test_the_main_threads_frames_are_found_in_the_last_dump() -> None:
    dump = (
        'Thread 0x0000000000000001 (most recent call first):\n  File "old.py", line 1 in old\n\n'
        'Thread 0x0000000000000002 (most recent call first):\n  File "w.py", line 2 in watch\n\n'
        'Current thread 0x0000000000000001 (most recent call first):\n'
        '  File "mine.py", line 53 in augment\n  File "loop.py", line 7 in train\n'
    )  # fmt: skip
    assert main_frames(dump, 1) == [Frame("mine.py", 53, "augment"), Frame("loop.py", 7, "train")]


@pytest.mark.parametrize("record", [None, "", "{", '{"entries": [{}]}', '{"entries": []}'])
def test_a_record_of_collectives_that_cannot_be_read_tells_nothing(record: str | None) -> None:
    assert collectives_in(record) is None


def slow(search: StragglerSearch, window: int, rank: int, factor: float) -> bool:
    """One window of 100 steps of 0.1 s, in which one rank's own time is `factor` times that of the others."""
    until = 100 * window
    own = dict.fromkeys(range(4), 0.03 * until)
    own[rank] *= factor
    beats = {each: beat(each, until, step=until, own_s=own[each], passes=max(1, until)) for each in own}
    return search.see(beats, 10.0 * window)


def test_a_straggler_is_named_when_it_is_the_same_rank_for_long_enough_and_costs_enough() -> None:
    search = StragglerSearch()
    changed = [slow(search, window, 2, 1.6) for window in range(WINDOWS + 1)]
    assert changed == [False] * WINDOWS + [True]
    assert search.found is not None
    assert (search.found.rank, search.found.host) == (2, "n1")
    assert search.found.line == (
        "rank 2 on n1 is slow: data and forward pass take 1.6 × the median of the other ranks, which costs 18% of each "
        "step"
    )


@pytest.mark.parametrize(("ranks", "factor"), [((2, 2, 2, 2), 1.2), ((0, 1, 2, 3), 1.6)])
def test_a_little_or_a_changing_delay_is_no_straggler(ranks: tuple[int, ...], factor: float) -> None:
    search = StragglerSearch()
    own, at = dict.fromkeys(range(4), 0.0), 0
    for rank in (0, *ranks):
        for each in own:
            own[each] += 3.0 * (factor if each == rank else 1.0)
        at += 100
        assert not search.see({n: beat(n, at, step=at, own_s=own[n], passes=at) for n in own}, at / 10)
    assert search.found is None
