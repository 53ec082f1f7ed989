"""Restart policy of a run on this machine: pure, one decision per ended attempt."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.outcome import Ending, Fault, Outcome

SAID = (Outcome.config_error, Outcome.diverged)
"""Outcomes whose reason the trainer itself has printed; the launcher does not repeat it."""
CANNOT = {
    "DataError": "the data cannot be used",
    "CheckpointError": "the checkpoints cannot be used",
    "StorageError": "the run folder or a store cannot be used",
}
"""Error type → message in place of "the config cannot run"."""
LAST_WORDS = {
    Outcome.done: "done",
    Outcome.preempted: "stopped and saved; the same command goes on from there",
    Outcome.config_error: "the config cannot run",
    Outcome.diverged: "diverged, and a restart would diverge again",
    Outcome.superseded: "another start has taken the run over",
}


@dataclass(frozen=True)
class Decision:
    """Decision to restart or stop, its reason in one line, and the restarts used so far."""

    go_on: bool
    reason: str
    restarts: int = 0
    brief: str = ""
    """Shorter message for a terminal in which the trainer has printed the reason."""


def decide(
    ending: Ending | None,
    restarts: int,
    max_restarts: int,
    progressed: bool,
    shrank: bool = True,
    stopped: str | None = None,
    stepped: bool = True,
    repeated: bool = False,
) -> Decision:
    """Return the decision after `ending`; None is an attempt that was killed before it recorded one.

    Args:
        restarts: starts since the last new checkpoint.
        progressed: the attempt made a new checkpoint, which resets the restart budget.
        shrank: after out_of_memory, the next attempt would use a smaller microbatch.
        stopped: the signal that asked the launcher to stop.
        stepped: a step of this run has succeeded, in this attempt or before.
        repeated: the same error of the user's code has ended an attempt at the same step before.
    """
    if ending is not None and is_last(ending):
        detail = f": {ending.reason}" if ending.reason and ending.outcome not in SAID else ""
        return Decision(False, f"{last_words(ending)} (step {ending.step}{detail})", restarts)
    what, spent = what_of(ending), 0 if progressed else restarts
    if (mistake := mistake_of(ending, stepped, repeated)) is not None:
        return Decision(False, f"{what}; {mistake}", spent, mistake)
    if stopped is not None:
        return Decision(False, f"{what}; not started again ({stopped}), the last checkpoint stands", spent)
    if ending is not None and ending.outcome is Outcome.out_of_memory:
        # A smaller microbatch is a new try, not a repeated one, so it does not count; it can only shrink so often.
        if ending.micro_batch is None or not shrank:
            return Decision(False, f"{what}, and micro_batch cannot get smaller", spent)
        return Decision(True, f"{what}; starting again with micro_batch={ending.micro_batch}", spent)
    if spent >= max_restarts:
        tries = f"{spent + 1} starts in a row made no new checkpoint, " if spent else ""
        return Decision(False, f"{what}; {tries}job.max_restarts={max_restarts} allows no other", spent)
    return Decision(True, f"{what}; starting again ({spent + 1} of {max_restarts} without a new checkpoint)", spent + 1)


def is_last(ending: Ending) -> bool:
    """True for an ending that another start would not change; an unreachable store may be back by then."""
    passing = ending.outcome is Outcome.config_error and ending.fault is Fault.machine and ending.error in CANNOT
    return ending.outcome in LAST_WORDS and not passing


def last_words(ending: Ending) -> str:
    if ending.outcome is Outcome.config_error:
        return CANNOT.get(ending.error, LAST_WORDS[ending.outcome])
    if ending.outcome is Outcome.preempted and ending.fault is Fault.left:
        return "stopped in the debugger; the same command goes on from the last checkpoint"
    return LAST_WORDS[ending.outcome]


def mistake_of(ending: Ending | None, stepped: bool, repeated: bool) -> str | None:
    """Return why another start would fail with the same user error; None if it may help."""
    if ending is None or ending.outcome is not Outcome.crashed:
        return None
    if ending.fault is Fault.left:
        return "not started again"
    if ending.fault is Fault.user and not (stepped or ending.step):
        return "not started again: before the first step that is a mistake"
    if ending.fault is Fault.user and repeated:
        return "not started again: the same error at the same step twice is a mistake"
    return None


def what_of(ending: Ending | None) -> str:
    if ending is None:
        return "killed without a word"
    if ending.outcome is Outcome.out_of_memory:
        return f"out of memory at step {ending.step}"
    if ending.outcome is Outcome.config_error:
        return f"{last_words(ending)} (step {ending.step}: {ending.reason})"
    if ending.outcome is Outcome.stalled:
        return f"stalled at step {ending.step}: {ending.reason}"
    place = f" ({ending.place})" if ending.place else ""
    return f"crashed at step {ending.step}: {ending.reason or 'unknown'}{place}"


def back_off_s(restarts: int) -> float:
    """Return seconds to wait before the next start: first 0, then more, for a store or driver to recover."""
    return 0.0 if restarts <= 1 else float(min(10.0, 0.5 * 2 ** (restarts - 2)))
