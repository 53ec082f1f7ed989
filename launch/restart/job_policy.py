"""Restart policy of a job under a scheduler: pure, one decision per ended start.

launch/restart/local_policy.py is the policy of a run on this machine; it also decides here how often a crash is
repeated, which does not depend on the scheduler.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from everstep.launch.config import CauseConfig, Remedy
from everstep.launch.job_start.start_record import NodeReport
from everstep.launch.restart import local_policy
from everstep.outcome import Ending, Outcome
from everstep.rank_env import LOST_PEER

LEAST_STALLS = 2
"""Stalls because of one node after which the job goes on without it."""


class Action(enum.Enum):
    """Next action of the batch script."""

    exit = "exit"
    again = "again"
    """Start again at once, in the same allocation."""
    requeue = "requeue"
    """Release the nodes and wait in the queue for others."""
    wait = "wait"
    """Do nothing: this node was disconnected, and the job has started again on other nodes."""


@dataclass(frozen=True)
class Evidence:
    """Facts about a start that has ended."""

    ending: Ending | None = None
    """Outcome record of its last attempt; None if there was no attempt or it was killed."""
    code: int = 1
    """Exit code of the step."""
    noticed: bool = False
    """The scheduler gave notice: the time limit is near, or another job gets the nodes."""
    lost: bool = False
    """The scheduler ended the start with its batch script: node lost, job requeued or preempted."""
    disrupted: bool = False
    """A pod was evicted while the others stay; this does not count against the restart budget."""
    hosts: tuple[str, ...] = ()
    reports: tuple[NodeReport, ...] = ()
    progressed: bool = False
    """There is a newer checkpoint than at the beginning of the start."""
    is_trainer: bool = True
    """False for another program, of which only the exit code is known."""
    overtaken: bool = False
    """Another job has taken the run folder over."""
    left_behind: bool = False
    """The same job has started again in the meantime and left this start behind."""
    shrank: bool = True
    """After out_of_memory: the next microbatch would be smaller."""
    spent: int = 0
    """Starts without a new checkpoint so far."""
    stepped: bool = True
    """A step of the run has succeeded, in this start or before."""
    repeated: bool = False
    """The same error of the user's code has ended an attempt at the same step before."""
    stalls: Mapping[str, int] = field(default_factory=dict)
    """Host → attempts of this run, the last included, that the watchdog has ended because of a rank there."""


@dataclass(frozen=True)
class RestartDecision:
    action: Action
    reason: str
    """Reason, one line for the user."""
    cause: str
    """Identifier: done, stopped, user_error, bad_node, preempted, lost, crashed …, or a key of job.causes."""
    restarts: int = 0
    """Starts without a new checkpoint, this one included."""
    exclude: tuple[str, ...] = field(default=())
    """Nodes to exclude from later starts."""
    exit_code: int = 0


def judge(evidence: Evidence, causes: Mapping[str, CauseConfig], max_restarts: int) -> RestartDecision:
    """Return the decision of the first rule that matches."""
    spent = 0 if evidence.progressed else evidence.spent
    if evidence.left_behind:
        # The batch script acts on the job by its number, so any other action would hit the new start.
        return RestartDecision(
            Action.wait, "the job has started again elsewhere; left behind, and waits to be ended", "superseded", spent
        )
    if evidence.overtaken:
        return _exit("superseded", "a later start has taken the run over", spent, Outcome.superseded.exit_code)
    if (final := _final(evidence, spent)) is not None:
        return final
    if (bad := _failed_checks(evidence)) is not None:
        return _limited(bad, spent, max_restarts)
    if evidence.disrupted:
        return _disrupted(evidence, spent)
    if evidence.lost:
        lost = "ended by the scheduler, which has started it again"
        return _limited(RestartDecision(Action.again, lost, "lost", exit_code=1), spent, max_restarts)
    if (stopped := _stopped(evidence)) is not None:
        if not evidence.is_trainer:  # whether it has saved is unknown, and a job may reach many time limits
            spent = 0
        return _limited(stopped, spent, max_restarts)
    if evidence.ending is not None and evidence.ending.outcome is Outcome.out_of_memory:
        return _short_of_memory(evidence, evidence.ending, max_restarts)
    return _crashed(evidence, causes, spent, max_restarts)


def _final(evidence: Evidence, spent: int) -> RestartDecision | None:
    """Return the decision for an ending that another start would not change; None for any other."""
    ending = evidence.ending or _by_code(evidence)
    if ending is None or not local_policy.is_last(ending):
        return None
    if ending.outcome is Outcome.preempted and (evidence.noticed or evidence.lost or _signal(evidence) is not None):
        return None
    reason = local_policy.decide(ending, spent, 0, evidence.progressed).reason
    if ending.reason and ending.outcome in local_policy.SAID:
        reason = f"{reason}: {ending.reason}"
    words = {Outcome.config_error: "user_error", Outcome.preempted: "stopped"}
    return _exit(words.get(ending.outcome, ending.outcome.value), reason, spent, ending.outcome.exit_code)


def _by_code(evidence: Evidence) -> Ending | None:
    """Return the ending that the exit code implies, for a start that recorded no outcome."""
    if evidence.lost or _signal(evidence) is not None or any(report.failed for report in evidence.reports):
        return None
    code = _first_code(evidence)
    if code == 0:
        return Ending(Outcome.done, reason="nothing was left to do" if evidence.is_trainer else "")
    said = [outcome for outcome in Outcome if evidence.is_trainer and outcome.exit_code == code and code > 1]
    return Ending(said[0], reason="before the first step") if said else None


def _first_code(evidence: Evidence) -> int:
    """Return the exit code of the node that failed first, else the step's; later failures follow from it."""
    codes = [report.code for report in evidence.reports if report.code and not report.stopped]
    return next((code for code in codes if code != LOST_PEER), codes[0] if codes else evidence.code)


def _signal(evidence: Evidence) -> str | None:
    """Return the signal that stopped every node; None if one got none, as after the failure of a node."""
    signals = [report.stopped for report in evidence.reports if report.code is not None]
    return signals[0] if signals and all(signals) and len(signals) == len(evidence.hosts) else None


def _failed_checks(evidence: Evidence) -> RestartDecision | None:
    bad = [report for report in evidence.reports if report.failed]
    if not bad:
        return None
    said = "; ".join(f"{report.host}: {report.failed[0]}" for report in bad)
    if len(bad) == len(evidence.hosts):
        # A check that fails on every node is no sign of a bad node.
        return _exit("bad_node", f"every node failed its checks ({said})", evidence.spent, 1)
    hosts = tuple(sorted(report.host for report in bad))
    return RestartDecision(Action.requeue, f"bad node ({said})", "bad_node", exclude=hosts, exit_code=1)


def _stopped(evidence: Evidence) -> RestartDecision | None:
    """Return the decision after a stop by the scheduler, by notice or signal; None if it stopped nothing."""
    signal = _signal(evidence)
    if not evidence.noticed and signal is None:
        return None
    why = "notice of the scheduler (time limit or preemption)" if evidence.noticed else f"{signal} to all nodes"
    ending = evidence.ending
    if ending is None or ending.outcome is not Outcome.preempted:
        how = "stopped, the last checkpoint stands" if evidence.is_trainer else "stopped"
    else:
        how = f"stopped and saved at step {ending.step}"
    return RestartDecision(Action.requeue, f"{how} after {why}", "preempted", exit_code=Outcome.preempted.exit_code)


def _disrupted(evidence: Evidence, spent: int) -> RestartDecision:
    said = {report.host for report in evidence.reports if report.code is not None and not report.stopped}
    gone = ", ".join(host for host in evidence.hosts if host not in said) or "a pod"
    saved = evidence.ending is not None and evidence.ending.outcome is Outcome.preempted
    how = (
        f"saved at step {evidence.ending.step}"
        if evidence.ending is not None and saved
        else "the last checkpoint stands"
    )
    return RestartDecision(
        Action.again,
        f"{gone} was taken away, {how}; starting again when all are there",
        "preempted" if saved else "lost",
        spent,
    )


def _short_of_memory(evidence: Evidence, ending: Ending, max_restarts: int) -> RestartDecision:
    decision = local_policy.decide(ending, evidence.spent, max_restarts, evidence.progressed, evidence.shrank)
    action = Action.again if decision.go_on else Action.exit
    return RestartDecision(action, decision.reason, ending.outcome.value, decision.restarts, exit_code=1)


def _crashed(evidence: Evidence, causes: Mapping[str, CauseConfig], spent: int, max_restarts: int) -> RestartDecision:
    report, cause = _cause(evidence, causes)
    what = local_policy.what_of(evidence.ending) if evidence.ending else f"ended with exit code {_first_code(evidence)}"
    if (mistake := local_policy.mistake_of(evidence.ending, evidence.stepped, evidence.repeated)) is not None:
        return _exit("user_error", f"{what}; {mistake}", spent, 1)
    if report is not None and cause is not None:
        what = f"{what} (cause {report.cause} on {report.host}: {report.line})"
        if cause.remedy is Remedy.stop:
            return _exit(str(report.cause), f"{what}; another start would fail alike", spent, 1)
    suspects = _suspects(evidence, causes)
    action = Action.requeue if suspects else Action.again
    name = str(report.cause) if report is not None else _name(evidence)
    return _limited(RestartDecision(action, what, name, exclude=suspects, exit_code=1), spent, max_restarts)


def _cause(evidence: Evidence, causes: Mapping[str, CauseConfig]) -> tuple[NodeReport, CauseConfig] | tuple[None, None]:
    """Return the most specific cause that a node has seen, and the node's report.

    A cause that stops the job must also match the recorded reason, if there is one: a warning may hold the same text.
    """
    order = list(causes)
    for report in sorted((r for r in evidence.reports if r.cause in causes), key=lambda r: order.index(str(r.cause))):
        cause = causes[str(report.cause)]
        said = None if evidence.ending is None else evidence.ending.reason
        if cause.remedy is not Remedy.stop or said is None or re.search(cause.match, said):
            return report, cause
    return None, None


def _suspects(evidence: Evidence, causes: Mapping[str, CauseConfig]) -> tuple[str, ...]:
    """Return nodes that reported a defect or stalled again, and those without a report after the end.

    A node that has begun and not ended was killed with the others and is not a suspect.
    """
    excluding = {name for name, cause in causes.items() if cause.remedy is Remedy.exclude}
    broken = {report.host for report in evidence.reports if report.cause in excluding}
    any_ended = any(report.code is not None for report in evidence.reports)
    silent = set(evidence.hosts) - {report.host for report in evidence.reports} if any_ended else set()
    suspects = broken | silent | _stalled_again(evidence)
    # A failure of every node is no sign of a bad node.
    return tuple(sorted(suspects)) if suspects < set(evidence.hosts) else ()


def _stalled_again(evidence: Evidence) -> set[str]:
    """Return the node of a stall if it is not its first: one stall may have any cause."""
    ending = evidence.ending
    if ending is None or ending.outcome is not Outcome.stalled or evidence.stalls.get(ending.node, 0) < LEAST_STALLS:
        return set()
    return {host for host in evidence.hosts if host.split(".")[0] == ending.node.split(".")[0]}


def _name(evidence: Evidence) -> str:
    stalled = evidence.ending is not None and evidence.ending.outcome is Outcome.stalled
    return str((Outcome.stalled if stalled else Outcome.crashed).value)


def _limited(verdict: RestartDecision, spent: int, max_restarts: int) -> RestartDecision:
    """Return the decision if the budget of starts without a new checkpoint allows it, else an exit."""
    if verdict.action is Action.exit:
        return verdict
    if spent >= max_restarts:
        tries = f"{spent + 1} starts in a row made no new checkpoint, " if spent else ""
        reason = f"{verdict.reason}; {tries}job.max_restarts={max_restarts} allows no other"
        return _exit("no_progress" if spent else verdict.cause, reason, spent, verdict.exit_code or 1)
    how = "starting again" if verdict.action is Action.again else "back to the queue"
    without = f" without {', '.join(verdict.exclude)}" if verdict.exclude else ""
    count = f" ({spent + 1} of {max_restarts} without a new checkpoint)"
    reason = f"{verdict.reason}; {how}{without}{count}"
    return RestartDecision(verdict.action, reason, verdict.cause, spent + 1, verdict.exclude, verdict.exit_code)


def _exit(cause: str, reason: str, spent: int, code: int) -> RestartDecision:
    return RestartDecision(Action.exit, reason, cause, spent, exit_code=code)
