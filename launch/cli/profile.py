"""`everstep profile RUN`: profile the next steps of a rank of a run that is going."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from everstep.errors import ConfigError, EverstepError
from everstep.launch.console import say
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_run, find
from everstep.run_folder import RunFolder, profile_request

POLL_S, POLL_REMOTE_S = 0.5, 5.0
"""Seconds between two looks for the result; the second in a store."""


def profile(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when the profile is there."""
    options = _parser().parse_args(arguments)
    folder = find(options.run, options.root)
    number = _going(folder)
    if options.rank and folder.storage.path() is None:
        raise ConfigError(f"--rank {options.rank}: in a store only rank 0 looks for requests; leave --rank out")
    if not folder.storage.exists(folder.attempt(number, f"rank-{options.rank:04d}.log")):
        raise ConfigError(f"--rank {options.rank}: attempt {number} has no such rank; everstep status shows how many")
    known = set(_profiles(folder, number, options.rank))
    request = profile_request(folder, number, options.rank)
    folder.storage.write(request, json.dumps({"steps": options.steps}).encode())
    say(f"rank {options.rank} is asked for {options.steps} steps; after Ctrl-C the profile is written all the same")
    name = _await(folder, number, options.rank, known)
    print(folder.storage.read(name).decode(errors="replace").rstrip())
    print(f"trace for https://ui.perfetto.dev: {folder.url}/{name.removesuffix('.txt')}.trace.json.gz")
    return 0


def _going(folder: RunFolder) -> int:
    attempts = folder.attempts()
    if not attempts or folder.ending(attempts[-1]) is not None:
        raise ConfigError(f"{folder.url} is not going; everstep run debug=profile profiles a new run")
    return attempts[-1]


def _profiles(folder: RunFolder, attempt: int, rank: int) -> list[str]:
    names = folder.storage.names(folder.attempt(attempt))
    found = [name for name in names if name.startswith(f"profile-rank-{rank:04d}-") and name.endswith(".txt")]
    return [folder.attempt(attempt, name) for name in sorted(found)]


def _await(folder: RunFolder, attempt: int, rank: int, known: set[str]) -> str:
    """Return the name of the new profile; EverstepError if the attempt ends without one."""
    while True:
        over = folder.ending(attempt) is not None or folder.attempts()[-1] != attempt
        new = [name for name in _profiles(folder, attempt, rank) if name not in known]
        if new:
            return new[-1]
        if over:
            raise EverstepError(f"attempt {attempt} of {folder.url} has ended without a profile of rank {rank}")
        time.sleep(POLL_S if folder.storage.path() is not None else POLL_REMOTE_S)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep profile",
        description="Profile the next steps of a run that is going: a trace for Perfetto and the dearest operators.",
    )
    add_run(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps to profile (5, at most 1000)")
    parser.add_argument("--rank", type=int, default=0, help="the rank that is profiled (0)")
    return parser
