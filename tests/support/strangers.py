"""Work done as another user, or from another network namespace, as an attacker on the same machine or network would."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

NOBODY = 65534
CLONE_NEWNET = 0x40000000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as a second user or network")
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


def as_another_user(work: Callable[[], Any]) -> Any:
    """Return the result of `work`, or the name of its error, done in a child with another uid."""
    return _in_child(work, _drop)


def _drop() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _in_child(work: Callable[[], Any], before: Callable[[], None]) -> Any:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            before()
            said: Any = work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


class Network:
    """A network namespace that is joined to this one by a pair of interfaces."""

    def __init__(self) -> None:
        self.name = f"es{uuid.uuid4().hex[:8]}"
        third = int(self.name[2:4], 16)
        self.here, self.there = f"10.213.{third}.1", f"10.213.{third}.2"

    def run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    def __enter__(self) -> Network:
        name = self.name
        self.run("ip", "netns", "add", name)
        self.run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
        self.run("ip", "link", "set", f"{name}b", "netns", name)
        self.run("ip", "addr", "add", f"{self.here}/24", "dev", f"{name}a")
        self.run("ip", "link", "set", f"{name}a", "up")
        self.run("ip", "-n", name, "addr", "add", f"{self.there}/24", "dev", f"{name}b")
        self.run("ip", "-n", name, "link", "set", f"{name}b", "up")
        self.run("ip", "-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.run("ip", "link", "del", f"{self.name}a")
            self.run("ip", "netns", "del", self.name)

    def do(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, done in the namespace as another user."""

        def enter() -> None:
            with open(f"/run/netns/{self.name}") as namespace:
                _setns(namespace.fileno())
            _drop()

        return _in_child(work, enter)


def _setns(descriptor: int) -> None:  # os.setns is there from Python 3.12 on
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    try:
        made = Network()
        made.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    with contextlib.ExitStack() as leaving:
        leaving.push(made.__exit__)
        yield made


def tcp(host: str, port: int, timeout_s: float = 5.0) -> socket.socket:
    return socket.create_connection((host, port), timeout=timeout_s)
