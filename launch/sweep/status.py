"""`status`, `cancel` and `resume` of a sweep, and `run --from`."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Sequence
from typing import Any

from everstep.errors import ConfigError, printable
from everstep.launch.config import JobConfig
from everstep.launch.console import number, print_table
from everstep.launch.runs.cancellation import cancel_jobs
from everstep.launch.runs.history import History, read_all
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import RunSummary, summaries
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.submit.array import recover
from everstep.launch.submit.trust import Runnable, refuse_foreign
from everstep.launch.sweep.base_config import check_key
from everstep.launch.sweep.display import summary
from everstep.launch.sweep.leaderboard import facts, ranked
from everstep.launch.sweep.lease import holder
from everstep.launch.sweep.plan import amended, load, named_plugins
from everstep.launch.sweep.start import drive
from everstep.launch.sweep.state import SweepState
from everstep.launch.sweep.sweep_folder import SweepFolder, find_sweep, kept_place
from everstep.provenance import user

QUEUED = 10
"""Queued trials that `status` lists."""


def status(folder: SweepFolder, as_json: bool) -> int:
    """Print the state of the sweep and its open trials, with one query to the scheduler."""
    plan, story = load(folder), folder.story()
    under_way = _under_way(folder, story)
    rows = ranked(plan, story)
    if as_json:
        told: dict[str, Any] = {
            "sweep": folder.name,
            "url": folder.url,
            "driver": holder(folder.storage),
            "cancelled": folder.is_stopped,
            "trials": [facts(plan, row) for row in rows],
            "under_way": [each.facts(0.0) | {"age_s": None} for each in under_way],
        }
        print(json.dumps(told, indent=1))
        return 0
    print(printable(f"sweep        {folder.name} in {folder.url}"))
    print(printable(f"driver       {holder(folder.storage) or 'none; everstep resume goes on'}"))
    print(f"trials       {summary(plan, story, [])}")
    if best := [row for row in rows if row.is_best][:1]:
        shown = ", ".join(f"{n} {number(v)}" for n, v in zip(plan.metrics, best[0].values, strict=False))
        print(printable(f"best         {best[0].trial.name}: {shown}"))
    if under_way:
        queued = [each for each in under_way if each.standing.state is RunState.queued]
        left_out = {each.history.name for each in queued[QUEUED:]}
        print_table(
            ("under way", "state", "step", "why"),
            [
                [
                    each.history.name,
                    each.standing.state.value,
                    str(each.history.progress.get("step", "")),
                    each.standing.why,
                ]
                for each in under_way
                if each.history.name not in left_out
            ],
        )
        if left_out:
            print(f"… and {len(left_out)} more in the queue")
    return 0


def _under_way(folder: SweepFolder, story: SweepState) -> list[RunSummary]:
    histories = read_all([folder.run(trial.name) for trial in story.trials if trial.is_open])
    found = [each for each in histories if isinstance(each, History)]
    return summaries(found)


def cancel(folder: SweepFolder) -> str:
    """Stop the driver from starting trials and cancel all that run; return the message."""
    by = f"{user()} on {socket.gethostname()}"
    job, story = load(folder).job, folder.story()
    if job.scheduler != "local":  # a driver that was killed may have left jobs that no trial records
        recover([folder.run(trial.name) for trial in story.trials if trial.is_open], scheduler(job.scheduler, job))
    going = [
        each
        for each in _under_way(folder, story)
        if each.history.handle is not None and not each.standing.state.is_over
    ]
    folder.stop(by, [each.history.name for each in going])
    cancel_jobs(going)
    return f"is cancelled, {len(going)} of its trials had jobs; 'everstep resume {folder.url}' goes on"


def resume(folder: SweepFolder, words: Sequence[str], again: bool = False, trusted: bool = False) -> int:
    """Resume the missing trials; with `again` also those that failed or were cancelled."""
    plan = load(folder)
    made, said = amended(plan, words), amended(dataclasses.replace(plan, job=JobConfig()), words)
    named = named_plugins(plan, words)
    code = kept_place(folder)
    refuse_foreign(
        folder.storage,
        recorded=Runnable.of(plan.job, plan.plugins, code),
        used=Runnable.of(made.job, plan.plugins, code),
        said=Runnable.of(said.job, named),
        trusted=trusted,
    )
    return drive(made, again)


def winner(word: str, root: str) -> list[str]:
    """Return the overrides of SWEEP/best, or of another trial SWEEP/NAME, as command-line arguments."""
    name, _, which = word.rstrip("/").rpartition("/")
    if not name:
        raise ConfigError(f"--from {word}: write SWEEP/best, or SWEEP/ and the name of a trial")
    folder = find_sweep(name, root)
    plan = load(folder)
    rows = ranked(plan, folder.story())
    found = [row for row in rows if (row.is_best if which == "best" else row.trial.name == which)]
    if not found:
        wanted = "no trial has a result yet" if which == "best" else f"there is no trial {which!r}"
        raise ConfigError(f"--from {word}: {wanted}; see 'everstep leaderboard {name}'")
    values = found[0].trial.values
    for key in values.keys() - {axis.key for axis in plan.axes if axis.is_group}:
        check_key(key)
        if key.split(".")[0] == "hooks":
            raise ConfigError(f"--from {word}: the trial's record would add {key}; add hooks yourself")
    return [f"{key}={_word(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    """Write a value so that Hydra's grammar reads it back."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(_word(each) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)
