"""`everstep attach RUN`: look into a rank that is running: its stacks, or a debugger in it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from everstep.errors import ConfigError, EverstepError
from everstep.fault import STACKS_SIGNAL
from everstep.launch.console import escape_control_sequences, say
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_run, find
from everstep.run_folder import RunFolder

PROCESS = re.compile(rb"rank \d+ is process (\d+) on (\S+)")
"""First line of a rank's log."""
REMOTE_PDB = (3, 14)
"""First version of Python whose pdb attaches to a process."""
STACKS_S, POLL_S = 20.0, 0.1
"""Seconds to wait for the stacks, which from a store come with the next upload of the log."""


def attach(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_args(arguments)
    folder = find(options.run, options.root)
    attempts = folder.attempts()
    if not attempts or folder.ending(attempts[-1]) is not None:
        raise ConfigError(f"{folder.url} is not going; everstep logs {options.run} shows what it has written")
    log = folder.attempt(attempts[-1], f"rank-{options.rank:04d}.log")
    pid = _process(folder, log, options.rank)
    if (spy := shutil.which("py-spy")) is not None:
        return subprocess.run([spy, "dump", "--pid", str(pid)], check=False).returncode
    if sys.version_info >= REMOTE_PDB:
        os.execv(sys.executable, [sys.executable, "-m", "pdb", "-p", str(pid)])
    print(escape_control_sequences(_stacks(folder, log, pid)).decode(errors="replace"), end="")
    say("pip install py-spy shows local frames of C too; from Python 3.14 on this verb opens pdb in the rank")
    return 0


def _process(folder: RunFolder, log: str, rank: int) -> int:
    """Return the process of a rank; ConfigError if it is not on this machine."""
    try:
        found = PROCESS.search(folder.storage.read(log))
    except FileNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f"--rank {rank}: {folder.url}/{log} names no process; everstep status shows which ranks there are"
        )
    pid, host = int(found[1]), found[2].decode()
    if host != socket.gethostname():
        raise ConfigError(f"--rank {rank} is process {pid} on {host}: run the same command there")
    return pid


def _catches(pid: int) -> bool:
    """True if a process has a handler for the signal: it would end any other process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.split("SigCgt:")[1].split()[0], 16) if "SigCgt:" in status else 0
    return bool(caught >> (STACKS_SIGNAL - 1) & 1)


def _stacks(folder: RunFolder, log: str, pid: int) -> bytes:
    """Return the stacks that the process writes at the end of its log."""
    if not _catches(pid):
        raise EverstepError(f"process {pid} is no rank that writes its stacks; has it just ended?")
    before = folder.storage.size(log)
    try:
        os.kill(pid, STACKS_SIGNAL)
    except (ProcessLookupError, PermissionError) as error:
        raise EverstepError(f"process {pid} cannot be asked: {error.strerror}") from error
    deadline, size = time.monotonic() + STACKS_S, before
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = folder.storage.size(log)
        if now > before and now == size:
            return bytes(folder.storage.read_range(log, before, now))
        size = now
    raise EverstepError(f"process {pid} has written no stacks within {STACKS_S:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep attach",
        description="Look into a rank that is running: by py-spy, by pdb from Python 3.14 on, else its stacks.",
    )
    add_run(parser)
    parser.add_argument("--rank", type=int, default=0, help="the rank (0)")
    return parser
