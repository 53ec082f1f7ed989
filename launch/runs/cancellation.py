"""Cancellation of runs: by their scheduler, by a stop marker in the run folder, or by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence

from everstep.launch.runs.history import History, has_process, is_here, read
from everstep.launch.runs.summary import RunSummary, summary
from everstep.launch.schedulers.job import CANCELLED, JobHandle, refuse_other_job
from everstep.launch.schedulers.registry import scheduler
from everstep.processes import command_line
from everstep.provenance import user
from everstep.run_folder import STOP_MARKER, RunFolder


def cancel_run(folder: RunFolder) -> str:
    """Cancel one run; return a message about the effect."""
    history = read(folder)
    here = summary(history)
    state = here.standing.state
    if state.is_over:
        return f"is over already ({state.value})"
    return _job(folder, history) if history.submissions else _processes(folder, here)


def cancel_jobs(found: Sequence[RunSummary]) -> None:
    """Cancel the jobs of many runs, by one command to each scheduler."""
    by_scheduler: dict[str, list[JobHandle]] = {}
    for each in found:
        handle = each.history.handle
        if handle is not None:
            refuse_other_job(handle, each.job, each.history.url)
            by_scheduler.setdefault(handle.scheduler, []).append(handle)
    for name, handles in by_scheduler.items():
        scheduler(name).cancel(handles)
    for each in found:
        _keep(RunFolder(each.history.url))


def _job(folder: RunFolder, history: History) -> str:
    newest = history.submissions[-1]
    cluster = scheduler(newest.scheduler or (newest.handle.scheduler if newest.handle else ""))
    handle = newest.handle if newest.is_settled else cluster.find(str(newest.intent.get("token", "")))
    if handle is None:
        _keep(folder)
        return "no job is known of it yet; if its launcher is still at work, cancel again"
    refuse_other_job(handle, cluster.status([handle])[handle], folder.storage.url)
    cluster.cancel([handle])
    _keep(folder)
    return f"{handle} is cancelled; the last checkpoint stands"


def _processes(folder: RunFolder, here: RunSummary) -> str:
    """Stop a run without a scheduler: by the stop marker, and on this machine also by a signal."""
    last = here.history.last
    if last is None:
        return "nothing has been started"
    folder.storage.write(STOP_MARKER, b"cancelled")
    if last.ending is not None:
        _keep(folder)
        return "is between two attempts: the next is told to stop by a marker in the run folder"
    if is_here(last) and last.pid is not None and has_process(last) and _trains(last.pid, folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # already gone, or left to the marker
            os.kill(last.pid, signal.SIGTERM)
        return f"attempt {last.number} is told to stop (process {last.pid}): it saves and ends"
    return f"attempt {last.number} on {last.host} is told to stop by a marker in the run folder: it saves and ends"


def _trains(pid: int, folder: RunFolder) -> bool:
    """True if a process trains this run folder; a claim from elsewhere may name any process of the user."""
    words = command_line(pid)
    return "everstep.trainer" in words and folder.storage.url in words


def _keep(folder: RunFolder) -> None:
    reason = f"cancelled by {user()} on {socket.gethostname()}"
    folder.record_restart({"outcome": CANCELLED, "go_on": False, "reason": reason, "restarts": 0})
