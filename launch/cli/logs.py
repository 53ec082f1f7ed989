"""`everstep logs RUN`: what a rank wrote, from any storage, across attempts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from everstep.errors import ConfigError
from everstep.launch.messages import say
from everstep.launch.parser import Arguments
from everstep.launch.runs.history import attempt as read_attempt
from everstep.launch.runs.history import read
from everstep.launch.runs.liveness import is_here
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.runs.summary import line
from everstep.launch.schedulers.registry import Statuses, following
from everstep.run_folder import RunFolder

POLL_S = 0.5
"""Seconds between looks at a log on a disk; a store is asked less often, and costs money."""
POLL_REMOTE_S = 5.0
STATE_EVERY_S = 5.0
"""Seconds between looks whether the run is over, which may mean to ask a scheduler."""


def logs(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_args(arguments)
    folder = find(options.run, options.root)
    if options.attempt is not None and options.attempt not in folder.attempts():
        raise ConfigError(f"--attempt {options.attempt}: the run has {_listed(folder.attempts())}")
    if options.follow:
        with following() as ask:
            return _follow(folder, ask, options)
    found = _paths(folder, options)
    if not found:
        raise ConfigError(
            f"{folder.url} has no {'output of a job' if options.job else 'attempt'} yet; -f waits for one"
        )
    if not folder.storage.exists(found[-1].path):
        attempt = found[-1].attempt
        raise ConfigError(f"--rank {options.rank}: attempt {attempt} has the logs of {_listed(ranks(folder, attempt))}")
    if written := Tail(folder, found[-1].path).read():
        _write(_last(written, options.tail))
    else:
        say(f"{found[-1].path} is empty; --job shows what all processes have printed")
    return 0


@dataclass(frozen=True)
class Source:
    """One file of a run's logs."""

    path: str
    attempt: int = 0
    """0 where it is the output of a job, of all its attempts."""


def _paths(folder: RunFolder, options: argparse.Namespace) -> list[Source]:
    """Those that are asked for, the newest last."""
    if options.job:
        names = [name for name in folder.storage.names() if name.startswith("slurm-") and name.endswith(".out")]
        return [Source(name) for name in sorted(names, key=lambda name: (len(name), name))]
    attempts = folder.attempts() if options.attempt is None else [options.attempt]
    return [Source(folder.attempt(number, f"rank-{options.rank:04d}.log"), number) for number in attempts]


@dataclass
class Tail:
    """One log as far as it was read."""

    folder: RunFolder
    path: str
    read_to: int = 0

    def read(self) -> bytes:
        """What has come since the last call."""
        try:
            size = self.folder.storage.size(self.path)
            found = self.folder.storage.read_range(self.path, self.read_to, size) if size > self.read_to else b""
        except FileNotFoundError:
            return b""
        self.read_to += len(found)
        return bytes(found)


def ranks(folder: RunFolder, attempt: int) -> list[int]:
    """Whose logs an attempt has."""
    names = folder.storage.names(folder.attempt(attempt))
    return [int(name[5:-4]) for name in names if name.startswith("rank-") and name.endswith(".log")]


def _follow(folder: RunFolder, ask: Statuses, options: argparse.Namespace) -> int:
    """All that comes, of the newest log and of those after it, until the run is over."""
    poll_s = POLL_S if folder.storage.path() is not None else POLL_REMOTE_S
    seen = _paths(folder, options)
    tail = Tail(folder, seen[-1].path) if seen else None
    if tail is not None:
        _write(_last(tail.read(), options.tail))
    for over in _looks(folder, ask, poll_s):
        if tail is not None:
            _write(tail.read())
        for source in _paths(folder, options)[len(seen) :]:
            if tail is not None:
                _write(tail.read())  # what it wrote between the look above and its end
            seen.append(source)
            tail = Tail(folder, source.path)
            _announce(folder, source)
            _write(tail.read())
        if over:
            return 0
    return 0


def _looks(folder: RunFolder, ask: Statuses, poll_s: float) -> Iterator[bool]:
    """A look every `poll_s` seconds; True is the last one, after the run was over."""
    asked = float("-inf")
    while True:
        over = False
        if time.monotonic() - asked > STATE_EVERY_S:
            asked = time.monotonic()
            history = read(folder, newest_only=True)
            jobs = ask([history.handle] if history.handle is not None else [])
            here = line(history, jobs.get(history.handle) if history.handle is not None else None)
            over = here.standing.state.is_over
        yield over
        if over:
            return
        time.sleep(poll_s)


def _announce(folder: RunFolder, source: Source) -> None:
    """Say in a line that another attempt, or job, has begun, and why."""
    if not source.attempt:
        _write(f"--- {source.path} ---\n".encode())
        return
    attempt = read_attempt(folder, source.attempt)
    where = f" on {attempt.host}" if attempt.host and not is_here(attempt) else ""
    decisions = [each for each in read(folder, newest_only=True).decisions if each.get("go_on")]
    why = f": {decisions[-1].get('reason', '')}" if decisions and source.attempt > 1 else ""
    _write(f"--- attempt {source.attempt}{where}{why} ---\n".encode())


def _last(data: bytes, lines: int | None) -> bytes:
    return data if lines is None else b"".join(data.splitlines(keepends=True)[max(0, len(data.splitlines()) - lines) :])


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > 8:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep logs", description="What a rank of a run has written.")
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, across restarts")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="whose log (0)")
    parser.add_argument("--attempt", type=int, metavar="N", help="of which attempt (the newest)")
    parser.add_argument("--job", action="store_true", help="what a job's script and all its processes have printed")
    parser.add_argument("--tail", type=int, metavar="N", help="the last N lines only")
    return parser
