"""Parsing of Slurm's job records: JSON of old (22.05) and new (23.11 and later) versions, and sacct."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everstep.errors import ConfigError
from everstep.launch.job_start.allocation import expand
from everstep.launch.schedulers.job import JobState, JobStatus

STATES = {
    "PENDING": JobState.pending,
    "CONFIGURING": JobState.pending,
    "REQUEUED": JobState.pending,
    "REQUEUE_FED": JobState.pending,
    "REQUEUE_HOLD": JobState.pending,
    "SPECIAL_EXIT": JobState.pending,
    "RESV_DEL_HOLD": JobState.pending,
    "RUNNING": JobState.running,
    "SUSPENDED": JobState.running,
    "STOPPED": JobState.running,
    "RESIZING": JobState.running,
    "SIGNALING": JobState.running,
    "STAGE_OUT": JobState.running,
    "COMPLETING": JobState.running,
    "COMPLETED": JobState.succeeded,
    "CANCELLED": JobState.cancelled,
    "REVOKED": JobState.cancelled,
    "PREEMPTED": JobState.preempted,
    "FAILED": JobState.failed,
    "TIMEOUT": JobState.failed,
    "DEADLINE": JobState.failed,
    "NODE_FAIL": JobState.failed,
    "BOOT_FAIL": JobState.failed,
    "LAUNCH_FAILED": JobState.failed,
    "RECONFIG_FAIL": JobState.failed,
    "OUT_OF_MEMORY": JobState.failed,
}
SACCT_FIELDS = "JobID,State,ExitCode,NodeList,Submit,Start,End"


@dataclass(frozen=True)
class Job:
    """One job of `squeue --json`, or one element of an array."""

    id: str
    comment: str
    cluster: str
    status: JobStatus


def jobs(text: str) -> list[Job]:
    """Return all jobs in the output; ConfigError if it cannot be parsed."""
    try:
        return [job for node in json.loads(text)["jobs"] for job in _jobs(node)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"squeue --json gave an answer that cannot be read: {type(error).__name__} {error}"
        ) from error


def _jobs(node: Mapping[str, Any]) -> list[Job]:
    comment, cluster = str(node.get("comment") or ""), str(node.get("cluster") or "")
    return [Job(id, comment, cluster, _status(node)) for id in _ids(node)]


def _ids(node: Mapping[str, Any]) -> list[str]:
    """Return the ids of an entry: the job id, or ARRAY_TASK for elements of an array.

    The last element to start has the array's own number as its job_id. Pending elements share one entry.
    """
    array, task = _number(node.get("array_job_id")), _number(node.get("array_task_id"))
    if array and task is not None:
        return [f"{array}_{task}"]
    waiting = str(node.get("array_task_string") or "")
    return [f"{array}_{number}" for number in _elements(waiting)] or [str(array or _number(node["job_id"]))]


def _elements(text: str) -> Iterator[int]:
    """Expand 1-3,8,20-30:5%4; the number after % is the limit of elements that run at a time."""
    for span in filter(None, text.partition("%")[0].split(",")):
        first, _, rest = span.partition("-")
        last, _, step = rest.partition(":")
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def _status(node: Mapping[str, Any]) -> JobStatus:
    words = _words(node["job_state"])
    state = _state(words)
    started, ended = _time(node.get("start_time")), _time(node.get("end_time"))
    reason = str(node.get("state_reason") or "")
    return JobStatus(
        state=state,
        reason=_reason(reason, words, state),
        nodes=expand(str(node.get("nodes") or "")),
        restarts=_number(node.get("restart_cnt")) or 0,
        submitted_at=_time(node.get("submit_time")),
        # For a pending job both times are estimates of the scheduler.
        started_at=None if state is JobState.pending else started,
        ended_at=ended if state.is_over else None,
        exit_code=_exit_code(node.get("exit_code")) if state.is_over else None,
        ending="COMPLETING" in words,
        token=str(node.get("comment") or ""),
    )


HELD = ("JobHeld", "JobHoldMaxRequeue", "job_requeued_in_held_state")
"""Reasons of a job that waits for `scontrol release`; the last only until the next scheduling cycle."""


def _reason(reason: str, words: list[str], state: JobState) -> str:
    if state is JobState.pending and reason.startswith(HELD):
        return f"{reason}: scontrol release lets it go on"
    return reason if reason != "None" else (words[0] if state is JobState.failed else "")


def _state(words: list[str]) -> JobState:
    """Return the state; newer Slurm adds flags to it: a job that is COMPLETING is still on its nodes."""
    if "COMPLETING" in words and not {"PENDING", "REQUEUED"} & set(words):
        return JobState.running
    return STATES.get(words[0], JobState.unknown) if words else JobState.unknown


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def _number(value: Any) -> int | None:
    """Return an int of old Slurm, or {set, infinite, number} of new Slurm; None if not set."""
    if isinstance(value, Mapping):
        return int(value["number"]) if value.get("set") and not value.get("infinite") else None
    return None if value is None else int(value)


def _time(value: Any) -> float | None:
    return float(number) if (number := _number(value)) else None


def _exit_code(value: Any) -> int | None:
    """Return the exit code, 128 + N for signal N; old Slurm gives wait()'s status, new Slurm its parts."""
    if isinstance(value, Mapping) and "return_code" in value:
        signal = value.get("signal") or {}
        number = _number(signal.get("id", signal.get("signal_id"))) if isinstance(signal, Mapping) else None
        return 128 + number if number else _number(value["return_code"])
    status = _number(value)
    if status is None:
        return None
    return 128 + (status & 0x7F) if status & 0x7F else status >> 8


def accounted(row: str) -> tuple[str, JobStatus]:
    """Return id and status of a job from a line of `sacct --parsable2` with SACCT_FIELDS."""
    number, said, code, nodes, *times = row.split("|")
    word = said.split()[0] if said else ""  # "CANCELLED by 1000"
    exit_code, _, signal = code.partition(":")
    submitted, started, ended = (_moment(text) for text in times)
    on = () if nodes.startswith("None") else expand(nodes)
    state = STATES.get(word, JobState.unknown)
    found = JobStatus(
        state=state,
        reason=word if state is JobState.failed else "",
        nodes=on,
        submitted_at=submitted,
        started_at=started if on else None,  # sacct gives a job that was cancelled while pending its end as start
        ended_at=ended,
        exit_code=128 + int(signal) if signal not in ("", "0") else int(exit_code or 0),
    )
    return number, found


def _moment(text: str) -> float | None:
    """Return seconds since the epoch of sacct's local time; None if it is Unknown or None."""
    import datetime

    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
