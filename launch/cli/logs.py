"""`everstep logs RUN`: print the log of a rank, from any storage, across attempts."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from everstep.errors import ConfigError
from everstep.launch.console import escape_control_sequences, say
from everstep.launch.parser import Arguments
from everstep.launch.runs.history import attempt as read_attempt
from everstep.launch.runs.history import is_here, read
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.runs.summary import summary
from everstep.launch.schedulers.registry import Statuses, following
from everstep.run_folder import RunFolder
from everstep.storage import blocks, start_of_last

POLL_S = 0.5
"""Seconds between polls of a log on a disk; stores, whose requests cost money, are polled less often."""
POLL_REMOTE_S = 5.0
STATE_EVERY_S = 5.0
"""Seconds between checks whether the run is over, which may query a scheduler."""


def logs(arguments: Sequence[str]) -> int:
    """Run the verb."""
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
    tail = Tail(folder, found[-1].path)
    if options.tail is not None:
        tail.skip_to_last(options.tail)
    tail.print()
    if not tail.read_to:
        say(f"{found[-1].path} is empty; --job shows what all processes have printed")
    return 0


@dataclass(frozen=True)
class LogSource:
    """One log file of a run."""

    path: str
    attempt: int = 0
    """0 for the output of a job, which covers all its attempts."""


def _paths(folder: RunFolder, options: argparse.Namespace) -> list[LogSource]:
    """Return the selected log files, the newest last."""
    if options.job:
        names = [name for name in folder.storage.names() if name.startswith("slurm-") and name.endswith(".out")]
        return [LogSource(name) for name in sorted(names, key=lambda name: (len(name), name))]
    attempts = folder.attempts() if options.attempt is None else [options.attempt]
    return [LogSource(folder.attempt(number, f"rank-{options.rank:04d}.log"), number) for number in attempts]


@dataclass
class Tail:
    """One log, and the position up to which it was read."""

    folder: RunFolder
    path: str
    read_to: int = 0

    def skip_to_last(self, lines: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.read_to = start_of_last(self.folder.storage, self.path, lines)

    def added(self) -> Iterator[bytes]:
        """Yield what was added since the last call, in blocks."""
        with contextlib.suppress(FileNotFoundError):
            for block in blocks(self.folder.storage, self.path, self.read_to):
                self.read_to += len(block)
                yield bytes(block)

    def print(self) -> None:
        for block in self.added():
            _write(block)


def ranks(folder: RunFolder, attempt: int) -> list[int]:
    """Return the ranks that have logs in an attempt."""
    names = folder.storage.names(folder.attempt(attempt))
    return [int(name[5:-4]) for name in names if name.startswith("rank-") and name.endswith(".log")]


def _follow(folder: RunFolder, ask: Statuses, options: argparse.Namespace) -> int:
    """Print the newest log and those after it as they grow, until the run is over."""
    poll_s = POLL_S if folder.storage.path() is not None else POLL_REMOTE_S
    seen = _paths(folder, options)
    tail = Tail(folder, seen[-1].path) if seen else None
    if tail is not None:
        if options.tail is not None:
            tail.skip_to_last(options.tail)
        tail.print()
    for over in _looks(folder, ask, poll_s):
        if tail is not None:
            tail.print()
        for source in _paths(folder, options)[len(seen) :]:
            if tail is not None:
                tail.print()  # written between the read above and its end
            seen.append(source)
            tail = Tail(folder, source.path)
            _announce(folder, source)
            tail.print()
        if over:
            return 0
    return 0


def _looks(folder: RunFolder, ask: Statuses, poll_s: float) -> Iterator[bool]:
    """Yield every `poll_s` seconds; True is the last value, after the run is over."""
    asked = float("-inf")
    while True:
        over = False
        if time.monotonic() - asked > STATE_EVERY_S:
            asked = time.monotonic()
            history = read(folder, newest_only=True)
            over = summary(history, ask).standing.state.is_over
        yield over
        if over:
            return
        time.sleep(poll_s)


def _announce(folder: RunFolder, source: LogSource) -> None:
    """Print a line for a new attempt or job, with the reason for the restart."""
    if not source.attempt:
        _write(f"--- {source.path} ---\n".encode())
        return
    attempt = read_attempt(folder, source.attempt)
    where = f" on {attempt.host}" if attempt.host and not is_here(attempt) else ""
    decisions = [each for each in read(folder, newest_only=True).decisions if each.get("go_on")]
    why = f": {decisions[-1].get('reason', '')}" if decisions and source.attempt > 1 else ""
    _write(f"--- attempt {source.attempt}{where}{why} ---\n".encode())


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(escape_control_sequences(data) if sys.stdout.isatty() else data)
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
