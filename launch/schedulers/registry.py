"""Schedulers by name, and status queries over several schedulers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator

from everstep.errors import ConfigError, EverstepError, nearest
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.base import Ask, Scheduler
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus

CLUSTERS = {
    "slurm": ("everstep.launch.schedulers.slurm.scheduler", "Slurm"),
    "k8s": ("everstep.launch.schedulers.kubernetes.scheduler", "Kubernetes"),
}
"""Scheduler → module and class; imported at its first use."""
Statuses = Callable[[Iterable[JobHandle]], dict[JobHandle, JobStatus]]


def scheduler(name: str, job: JobConfig | None = None) -> Scheduler:
    """Return the scheduler; `job` selects the cluster where the scheduler has several."""
    if name not in CLUSTERS:
        raise ConfigError(f"there is no scheduler {name!r}{nearest(name, CLUSTERS)}; change job.scheduler")
    module, kind = CLUSTERS[name]
    which = [job] if name == "k8s" and job is not None else []
    made: Scheduler = getattr(importlib.import_module(module), kind)(*which)
    return made


def statuses(handles: Iterable[JobHandle]) -> dict[JobHandle, JobStatus]:
    """Return statuses by one query per scheduler; `unknown` with the reason if one does not answer."""
    return _asked(handles, lambda name: scheduler(name).status)


@contextlib.contextmanager
def following() -> Iterator[Statuses]:
    """Return `statuses` for repeated queries: each scheduler is created once, and watched if it can be."""
    with contextlib.ExitStack() as stack:
        asks: dict[str, Ask] = {}

        def of(name: str) -> Ask:
            if name not in asks:
                asks[name] = stack.enter_context(scheduler(name).follow())
            return asks[name]

        yield lambda handles: _asked(handles, of)


def _asked(handles: Iterable[JobHandle], of: Callable[[str], Ask]) -> dict[JobHandle, JobStatus]:
    by_scheduler: dict[str, list[JobHandle]] = {}
    for handle in sorted(set(handles)):
        by_scheduler.setdefault(handle.scheduler, []).append(handle)
    found: dict[JobHandle, JobStatus] = {}
    for name, group in by_scheduler.items():
        try:
            found |= of(name)(group)
        except EverstepError as error:
            found |= {handle: JobStatus(JobState.unknown, str(error)) for handle in group}
    return found
