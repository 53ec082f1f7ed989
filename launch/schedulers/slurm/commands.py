"""Slurm's command-line tools: run one, and retry it while the controller is unreachable."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everstep.errors import ConfigError
from everstep.launch.console import say

UNREACHABLE = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "connect failure",
    "Connection refused",
    "Transport endpoint is not connected",
    "backup controller in standby mode",
)
"""Error texts of Slurm's commands for an unreachable controller, not an invalid request."""
RETRY_S = 60.0
"""Seconds for which a command is retried while the controller is unreachable."""
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in f"{self.out}\n{self.err}".splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


Ask = Callable[[Sequence[str]], Answer]
"""Type of a function that runs a Slurm command."""


def ask(argv: Sequence[str], retry_s: float = RETRY_S, **more: str) -> Answer:
    """Run a Slurm command, retrying with growing pauses while the controller is unreachable.

    Args:
        more: additional environment variables.

    Raises:
        ConfigError: this machine has no such command, or it gave no answer in time.
    """
    pause_s, deadline = 0.5, time.monotonic() + retry_s
    while True:
        answer = _run(argv, more)
        unreachable = answer.code != 0 and any(words in answer.err for words in UNREACHABLE)
        # An sbatch without an answer may have been accepted all the same: a retry could create two jobs.
        if not unreachable or argv[0] == "sbatch" or time.monotonic() + pause_s > deadline:
            return answer
        _say_unreachable(answer.last_line)
        time.sleep(pause_s)
        pause_s = min(10.0, 2 * pause_s)


def _run(argv: Sequence[str], more: dict[str, str]) -> Answer:
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=_environment() | more,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"job=slurm needs Slurm's commands, and there is no {argv[0]} here; submit on a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{argv[0]} gave no answer within {TIMEOUT_S:.0f} s") from error
    return Answer(done.returncode, done.stdout, done.stderr)


@functools.cache
def _say_unreachable(why: str) -> None:
    """Report once that the controller is unreachable."""
    say(f"waiting for Slurm's controller: {why}")


def _environment() -> dict[str, str]:
    """Return the environment without SLURM_ARRAY_*: sbatch would pass these on to a job that is no array."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
