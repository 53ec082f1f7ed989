"""Timeline of a run: the moments for the goodput computation, from the records of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from everstep.launch.runs.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, Pause, Stretch, Timeline
from everstep.launch.runs.history import READERS, Attempt, History
from everstep.launch.schedulers.job import JobStatus
from everstep.run_folder import EVENTS, METRICS, RunFolder

Record = dict[str, Any]


@dataclass(frozen=True)
class Account:
    """Records of one attempt."""

    attempt: Attempt
    events: Sequence[Record]
    steps: Sequence[Record]
    """Its training records, in the order of writing."""
    start_step: int

    @property
    def reached(self) -> int:
        """Return the highest step recorded as done."""
        ending = self.attempt.ending
        told = [int(record["step"]) for record in (*self.events, *self.steps) if "step" in record]
        return max(told + ([ending.step] if ending else []), default=self.start_step)

    @property
    def last_sign(self) -> float:
        ending = self.attempt.ending
        if ending is not None and ending.time:
            return ending.time
        return max([float(record.get("time") or 0.0) for record in (*self.events, *self.steps)]
                   + [self.attempt.claimed_at])  # fmt: skip


def timeline(folder: RunFolder, history: History, job: JobStatus | None, until: float | None) -> Timeline:
    """Return the timeline of a run.

    Args:
        until: now for a run that is under way; None for one that is over, which ends at its last record.
    """
    with ThreadPoolExecutor(READERS) as pool:
        accounts = list(pool.map(lambda attempt: account(folder, attempt), history.attempts))
    last_sign = max([each.last_sign for each in accounts] + [each.at for each in history.submissions], default=0.0)
    decided = [float(each["time"]) for each in history.decisions if each.get("time")]
    end = max([last_sign, *decided]) if until is None else until
    stretches, passed, replayed = [], 0, 0
    for each in accounts:
        running = until is not None and each is accounts[-1] and each.attempt.ending is None
        ended = end if running else each.last_sign
        stretches.append(_stretch(each, ended, passed))
        replayed += max(0, min(passed, each.reached) - each.start_step)
        passed = max(passed, each.reached)
    scheduled = bool(history.submissions)
    restarts = [float(each["time"]) for each in history.decisions if each.get("go_on") and each.get("time")]
    asked = [each.at for each in history.submissions] + (restarts if scheduled else [])
    given = [each.at for each in history.starts] + ([job.started_at] if job is not None and job.started_at else [])
    return Timeline(history.started_at or end, end, stretches, asked, given, replayed)


def account(folder: RunFolder, attempt: Attempt) -> Account:
    events = list(folder.lines(attempt.number, EVENTS))
    metrics = [record for record in folder.lines(attempt.number, METRICS) if record.get("kind") == "train"]
    restored = folder.facts(folder.attempt(attempt.number, "restored.json"))
    return Account(attempt, events, metrics, int(restored.get("step") or 0))


def _stretch(account: Account, ended: float, passed: int) -> Stretch:
    first = next((float(event["time"]) for event in account.events if event.get("event") == "first_step"), None)
    if first is None and account.steps:
        first = float(account.steps[0]["time"])
    return Stretch(
        account.attempt.began_at,
        ended,
        first,
        _caught_up(account, first, passed, ended),
        [*_pauses(account)],
    )


def _caught_up(account: Account, first: float | None, passed: int, ended: float) -> float | None:
    """Return the time at which the attempt had done step `passed`, interpolated between two records."""
    if first is None or passed <= account.start_step:
        return None
    at, step = first, account.start_step + 1
    for record in account.steps:
        time, reached = float(record["time"]), int(record["step"])
        if reached >= passed:
            share = (passed - step) / (reached - step) if reached > step else 1.0
            return at + min(max(share, 0.0), 1.0) * (time - at)
        at, step = time, reached
    return ended


def _pauses(account: Account) -> list[Pause]:
    kinds = {"saved": CHECKPOINT, "saved_locally": CHECKPOINT, "evaluated": EVALUATION}
    pauses = [
        Pause(kinds[event["event"]], float(event["time"]), float(event.get("seconds") or 0.0))
        for event in account.events
        if event.get("event") in kinds
    ]
    step = account.start_step
    for record in account.steps:
        steps, rate = int(record["step"]) - step, float(record.get("steps_per_s") or 0.0)
        step = int(record["step"])
        if rate > 0 and steps > 0:
            # `data_wait` is a fraction of the time since the record before.
            waited = float(record.get("data_wait") or 0.0) * steps / rate
            pauses.append(Pause(DATA_WAIT, float(record["time"]), waited))
    return pauses
