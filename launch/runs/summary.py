"""A run in one line: its state, step, rate and last metric."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.launch.console import say
from everstep.launch.runs.history import History, NotARun, alive, read_all
from everstep.launch.runs.lookup import names
from everstep.launch.runs.state import RunStatus, standing
from everstep.launch.schedulers.job import JobStatus
from everstep.launch.schedulers.registry import Statuses, statuses
from everstep.run_folder import RunFolder
from everstep.storage import join_url, open_storage


@dataclass(frozen=True)
class RunSummary:
    """One run, as far as one look into its folder tells."""

    history: History
    job: JobStatus | None
    standing: RunStatus

    def facts(self, now: float) -> dict[str, Any]:
        history, progress = self.history, self.history.progress
        last, over = history.last, self.standing.state.is_over
        name, value = metric(progress)
        return {
            "run": history.name,
            "url": history.url,
            "state": self.standing.state.value,
            "why": self.standing.why,
            "step": _step(history),
            "steps": progress.get("steps"),
            "steps_per_s": progress.get("steps_per_s"),
            "eta_s": None if over else progress.get("eta_s"),
            "metric": name,
            "value": value,
            "attempt": last.number if last else None,
            "where": where(history, self.job),
            "age_s": now - history.started_at if history.started_at else None,
        }


def lines(root: str) -> tuple[list[RunSummary], int]:
    """Return the runs below `root`, the newest at the end, and the number of unreadable ones.

    Each of these gets a line on stderr. There is one query for all jobs.
    """
    store = open_storage(root)
    folders = [RunFolder(join_url(store.url, name)) for name in names(root)]
    found = read_all(folders)
    histories = [each for each in found if isinstance(each, History)]
    unreadable = [each for each in found if not isinstance(each, History | NotARun)]
    for error in unreadable:
        say(f"left out: {error}")
    return summaries(sorted(histories, key=lambda each: each.started_at or 0.0)), len(unreadable)


def summaries(histories: Sequence[History], ask: Statuses = statuses) -> list[RunSummary]:
    """Return the summary of each run; one query to the schedulers for all of their jobs."""
    jobs = ask([each.handle for each in histories if each.handle is not None])
    return [line(each, jobs.get(each.handle) if each.handle is not None else None) for each in histories]


def summary(history: History, ask: Statuses = statuses) -> RunSummary:
    """Return the summary of one run, with the state of its job from its scheduler."""
    return summaries([history], ask)[0]


def line(history: History, job: JobStatus | None) -> RunSummary:
    now = time.time()
    return RunSummary(history, job, standing(history, job, alive(history, now), now))


def metric(progress: dict[str, Any]) -> tuple[str | None, float | None]:
    """The last evaluation's `evaluate.metric`, or the training loss."""
    evaluated = progress.get("metrics") or {}
    name = progress.get("metric")
    return (name, evaluated[name]) if name in evaluated else ("loss", progress.get("loss"))


def where(history: History, job: JobStatus | None) -> str:
    """Nodes and job, or the host of the last attempt."""
    if history.handle is not None:
        nodes = "" if job is None or not job.nodes else f" on {job.nodes[0]}"
        more = "" if job is None or len(job.nodes) < 2 else f" +{len(job.nodes) - 1}"
        return f"{history.handle.scheduler} {history.handle.id}{nodes}{more}"
    return history.last.host if history.last else ""


def _step(history: History) -> int | None:
    last = history.last
    if last is not None and last.ending is not None:
        return max(last.ending.step, int(history.progress.get("step") or 0))
    return history.progress.get("step")
