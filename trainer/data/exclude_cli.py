"""`everstep data exclude RUN --samples … [--from STEP]`: leave samples out of all later steps."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import replace

from everstep.config import ExcludeConfig, RunConfig, first_steps_without
from everstep.errors import ConfigError
from everstep.frozen_config import digest, settle, thaw
from everstep.provenance import user
from everstep.run_folder import CONFIG, EXCLUSIONS, RunFolder


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `exclude`; the caller passes the parsed namespace to `run`."""
    exclude = verbs.add_parser("exclude", help="leave samples out of a run from a step on, as for a deletion request")
    exclude.add_argument("run_url", metavar="RUN", help="a run folder, as a path or URL")
    exclude.add_argument(
        "--samples",
        required=True,
        metavar="FILE|NAMES",
        help="ids, FILE:ROW of shards or COLUMN=VALUE: with commas between them, or a file of one a line",
    )
    exclude.add_argument("--from", dest="first", type=int, metavar="STEP", help="first step without them (the next)")
    exclude.add_argument("--note", default="", metavar="TEXT", help="kept in the record, such as a ticket's number")
    exclude.add_argument("--stopped", action="store_true", help="no process of the run is alive; I have looked")


def run(args: argparse.Namespace) -> int:
    """Record the exclusion in the run folder; the next start trains without the samples."""
    from everstep.trainer.data.ordering.sample_names import all_ids, listed
    from everstep.trainer.data.ordering.trace import Trace

    folder = RunFolder(args.run_url)
    trace = Trace(folder)
    config = thaw(folder.storage.read(CONFIG))
    samples = all_ids(trace, listed(args.samples), "--samples")
    if not samples:
        raise ConfigError(f"--samples {args.samples}: it names no sample")
    first = _first_step(args.first, folder)
    _refuse_alive(folder, args.stopped)
    known = first_steps_without(config.exclude)
    new = [sample for sample in samples if known.get(sample, first + 1) > first]
    if not new:
        print(f"nothing to do: {_counted(samples)} left out of step {first} already")
        return 0
    if len(known.keys() | set(new)) >= trace.order.samples:
        raise ConfigError(f"--samples: nothing would be left of the {trace.order.samples} samples of the run")
    changed = replace(config, exclude=[*config.exclude, ExcludeConfig(from_step=first, samples=new, requested=True)])
    settle(changed, folder)
    _record(folder, changed, new, first, args.note)
    visits = [visit.step for sample in new for visit in trace.visits(sample)]
    before = sum(step < first for step in visits)
    print(
        f"{_counted(new)} left out from step {first} on: {len(visits) - before} of the places to come stay empty; "
        f"what {before} earlier uses have taught the model stays in it. 'everstep resume' goes on without them"
    )
    return 0


def _first_step(asked: int | None, folder: RunFolder) -> int:
    """Return the first step without the samples; it must be one that the run has not done."""
    reached = folder.reached_step()
    first = reached + 1 if asked is None else asked
    if first <= reached:
        raise ConfigError(
            f"--from {first}: the run has reached step {reached}, and what it has used cannot be taken back; give "
            f"{reached + 1} or later, or start a new run with exclude=[…]"
        )
    return first


def _refuse_alive(folder: RunFolder, stopped: bool) -> None:
    """Raise ConfigError if the newest attempt may still be training, with the samples."""
    attempts = folder.attempts()
    if stopped or not attempts or folder.ending(attempts[-1]) is not None:
        return
    raise ConfigError(
        f"{folder.url}: attempt {attempts[-1]} has recorded no end, so it may still train with these samples; stop it "
        "with 'everstep cancel' first, or add --stopped if its processes are gone"
    )


def _record(folder: RunFolder, config: RunConfig, samples: Sequence[int], first: int, note: str) -> None:
    """Record who left what out, and when, as the next of the run's exclusions."""
    facts = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "user": user(),
        "from_step": first,
        "samples": list(samples),
        "config_digest": digest(config),
        "note": note,
    }
    number = len(folder.storage.names(EXCLUSIONS)) + 1
    while not folder.storage.create(f"{EXCLUSIONS}/{number:04d}.json", (json.dumps(facts) + "\n").encode()):
        number += 1


def _counted(samples: Sequence[int]) -> str:
    return "1 sample is" if len(samples) == 1 else f"{len(samples):,} samples are"
