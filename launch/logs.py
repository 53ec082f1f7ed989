"""`everstep logs RUN`: what a rank wrote, from any storage, across attempts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.alive import is_here
from launch.cluster import statuses
from launch.history import attempt as read_attempt
from launch.history import read
from launch.ls import line
from launch.runs import add_run, find
from trainer.errors import ConfigError
from trainer.run_folder import RunFolder

POLL_S = 0.5
"""Seconds between looks at a log on a disk; a store is asked less often, and costs money."""
POLL_REMOTE_S = 5.0
STATE_EVERY_S = 5.0
"""Seconds between looks whether the run is over, which may mean to ask a scheduler."""


def logs(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_args(arguments)
    folder = find(options.run, options.root)
    number = options.attempt or max(folder.attempts(), default=0)
    if options.attempt is not None and options.attempt not in folder.attempts():
        raise ConfigError(f"--attempt {options.attempt}: the run has {_listed(folder.attempts())}")
    if not number and not options.follow:
        raise ConfigError(f"{folder.url} has no attempt yet; with -f this waits for one")
    if options.follow:
        return _follow(folder, options.rank, number, options.tail)
    tail = Tail(folder, number, options.rank)
    if not tail.exists():
        raise ConfigError(f"--rank {options.rank}: attempt {number} has the logs of {_listed(ranks(folder, number))}")
    _write(_last(tail.read(), options.tail))
    return 0


@dataclass
class Tail:
    """One log as far as it was read."""

    folder: RunFolder
    attempt: int
    rank: int
    read_to: int = 0

    @property
    def path(self) -> str:
        return self.folder.attempt(self.attempt, f"rank-{self.rank:04d}.log")

    def exists(self) -> bool:
        return self.folder.storage.exists(self.path)

    def read(self) -> bytes:
        """What has come since the last call."""
        try:
            size = self.folder.storage.size(self.path)
            found = self.folder.storage.read_range(self.path, self.read_to, size) if size > self.read_to else b""
        except FileNotFoundError:
            return b""
        self.read_to += len(found)
        return found


def ranks(folder: RunFolder, attempt: int) -> list[int]:
    """Whose logs an attempt has."""
    names = folder.storage.names(folder.attempt(attempt))
    return [int(name[5:-4]) for name in names if name.startswith("rank-") and name.endswith(".log")]


def _follow(folder: RunFolder, rank: int, number: int, last: int | None) -> int:
    """All that comes, of this attempt and of those after it, until the run is over."""
    poll_s = POLL_S if folder.storage.path() is not None else POLL_REMOTE_S
    tail = Tail(folder, number, rank) if number else None
    if tail is not None:
        _write(_last(tail.read(), last))
    for over in _looks(folder, poll_s):
        if tail is not None:
            _write(tail.read())
        for newer in [each for each in folder.attempts() if each > (tail.attempt if tail else 0)]:
            if tail is not None:
                _write(tail.read())  # what it wrote between the look above and its end
            tail = Tail(folder, newer, rank)
            _announce(folder, newer)
            _write(tail.read())
        if over:
            return 0
    return 0


def _looks(folder: RunFolder, poll_s: float) -> Iterator[bool]:
    """A look every `poll_s` seconds; True is the last one, after the run was over."""
    asked = float("-inf")
    while True:
        over = False
        if time.monotonic() - asked > STATE_EVERY_S:
            asked = time.monotonic()
            history = read(folder, newest_only=True)
            jobs = statuses([history.handle] if history.handle is not None else [])
            here = line(history, jobs.get(history.handle) if history.handle is not None else None)
            over = here.standing.state.is_over
        yield over
        if over:
            return
        time.sleep(poll_s)


def _announce(folder: RunFolder, number: int) -> None:
    """Say in a line that another attempt has begun, and why."""
    attempt = read_attempt(folder, number)
    where = f" on {attempt.host}" if attempt.host and not is_here(attempt) else ""
    decisions = [each for each in read(folder, newest_only=True).decisions if each.get("go_on")]
    why = f": {decisions[-1].get('reason', '')}" if decisions and number > 1 else ""
    _write(f"--- attempt {number}{where}{why} ---\n".encode())


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
    parser = argparse.ArgumentParser(prog="everstep logs", description="What a rank of a run has written.")
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, across restarts")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="whose log (0)")
    parser.add_argument("--attempt", type=int, metavar="N", help="of which attempt (the newest)")
    parser.add_argument("--tail", type=int, metavar="N", help="the last N lines only")
    return parser
