"""`python -m everstep.…` and `python -m torch.distributed.run` without their imports: a second instead of three.

Under the fixture `warm` such commands are forked, with all that they start by the same words, from a process that has
imported torch and Everstep. Each is a process of its own as before: child of the one that started it, with the pid,
session, signals, folder, environment and streams it was given. What a fork cannot show are the imports themselves,
and what Python does at its end; tests of these, and one of
each kind of start, do without. With EVERSTEP_TESTS_COLD=1 all do.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from support import PATHS
from support.warm_process import Command, Plain

SET_SUBREAPER, GET_SUBREAPER = 36, 37
EXEC = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SIGNATURE = inspect.signature(EXEC)


@pytest.fixture
def warm() -> Iterator[None]:
    with forked():
        yield


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """For fixtures of more than one test."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("EVERSTEP_TESTS_COLD"):
            patch.setattr(subprocess.Popen, "_execute_child", _ask)
        yield


class Server:
    """The process that has imported everything. It lives as long as this one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "ROOM": "x" * 65536}
        words = [sys.executable, "-m", "support.warm_process", str(theirs.fileno()), "x" * 16384]
        with theirs:
            self.process = subprocess.Popen(words, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket, self._lock = ours, threading.Lock()

    def fork(self, command: Command, streams: list[int]) -> int:
        """The pid of a process that is a child of ours."""
        with self._lock, _adopting():
            socket.send_fds(self._socket, [pickle.dumps(command)], streams)
            return int(self._socket.recv(64))


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Make orphans children of this process."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(GET_SUBREAPER, ctypes.byref(before))
    prctl(SET_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(SET_SUBREAPER, before.value)


class Popen(subprocess.Popen[Any]):
    """For what is started without the fixture."""

    if not os.environ.get("EVERSTEP_TESTS_COLD"):

        def _execute_child(self, *given: Any) -> None:
            _ask(self, *given)


def run(words: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run, with the output as text."""
    pipes: Plain = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(words, **pipes, **options) as child:
        try:
            printed, said = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(words, child.returncode, printed, said)


_servers: list[Server] = []


def _server() -> Server:
    if not _servers or _servers[-1].process.poll() is not None:
        _servers.append(Server())
    return _servers[-1]


def _ask(self: subprocess.Popen[Any], *given: Any) -> None:
    """In place of Popen's own, which forks and executes; whatever is no such command goes there."""
    words: Plain = SIGNATURE.bind(self, *given).arguments
    command = Command.of(words)
    if command is None or words["preexec_fn"] is not None:
        EXEC(self, *given)
        return
    streams = [words["p2cread"], words["c2pwrite"], words["errwrite"]]
    self.pid = _server().fork(command, [number if fd == -1 else fd for number, fd in enumerate(streams)])
    self._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    self._close_pipe_fds(*(words[name] for name in pipes))  # type: ignore[attr-defined]
