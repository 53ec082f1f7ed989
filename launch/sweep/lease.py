"""Lease of a sweep's driver: a file with a counter that its holder increments.

Clocks of two machines are never compared: a driver that wants the lease polls the counter by its own clock, and takes
the lease over when the counter does not change. The take-over is a create-only write of the next number, so only one
driver wins.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError, StorageError, SupersededError
from everstep.processes import SLACK_S, created_at
from everstep.storage import Storage

LEASES = "leases"
RENEW_S = 2.0
PATIENCE_S = 12.0
"""Seconds without a renewal after which a holder on another machine counts as dead."""


@dataclass
class Lease:
    """A held lease, renewed in the background from `take` to `release`."""

    storage: Storage
    number: int
    renew_s: float = RENEW_S
    patience_s: float = PATIENCE_S
    _counter: int = 0
    _renewed: float = field(default_factory=time.monotonic)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def check(self) -> None:
        """Raise SupersededError if another driver has taken over. Called before each start and each write."""
        if time.monotonic() - self._renewed > self.patience_s / 2:
            self._renew()  # this process or the store was suspended
        if newest(self.storage) > self.number:
            raise SupersededError("another driver has taken the sweep over; this one stops")

    def keep(self) -> Lease:
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return self

    def _keep(self) -> None:
        while not self._over.wait(self.renew_s):
            try:
                self._renew()
            except (OSError, StorageError):  # the next renewal may succeed; `check` detects when it is too late
                continue

    def _renew(self) -> None:
        self._counter += 1
        self.storage.write(_file(self.number), _text(self._counter, self.renew_s))
        self._renewed = time.monotonic()

    def release(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.storage.write(_file(self.number), _text(self._counter, self.renew_s, released=True))


def take(
    storage: Storage,
    renew_s: float = RENEW_S,
    patience_s: float = PATIENCE_S,
    wait: Callable[[float], None] = time.sleep,
) -> Lease:
    """Take the lease and return it. ConfigError that names the holder while it is alive."""
    number = newest(storage)
    if number:
        _await_end(storage, number, patience_s, wait)
    if not storage.create(_file(number + 1), _text(0, renew_s)):
        raise ConfigError(f"{_holder(_read(storage, number + 1))} has begun to drive {storage.url} this moment")
    return Lease(storage, number + 1, renew_s, patience_s).keep()


def holder(storage: Storage) -> str | None:
    """Return a description of the driver's process; None without a driver.

    A driver on another machine is not checked for liveness, so it may be dead.
    """
    number = newest(storage)
    facts = _read(storage, number) if number else {}
    if not facts or facts.get("released") or (facts.get("machine") == machine() and not _lives(facts)):
        return None
    return _holder(facts)


def newest(storage: Storage) -> int:
    return max((int(name.removesuffix(".json")) for name in storage.names(LEASES)), default=0)


def _await_end(storage: Storage, number: int, patience_s: float, wait: Callable[[float], None]) -> None:
    """Wait until the holder is certainly dead; ConfigError when it is alive."""
    seen = _read(storage, number)
    if seen.get("released"):
        return
    if seen.get("machine") == machine():
        if not _lives(seen):
            return
        raise ConfigError(f"{storage.url} is driven by {_holder(seen)}; 'everstep status' shows how far it is")
    deadline = time.monotonic() + max(patience_s, 5 * float(seen.get("renew_s") or 0.0))
    while time.monotonic() < deadline:
        wait(min(0.5, patience_s / 10))
        now = _read(storage, number)
        if now.get("released"):
            return
        if now.get("counter") != seen.get("counter"):
            raise ConfigError(f"{storage.url} is driven by {_holder(seen)}; 'everstep status' shows how far it is")


def machine() -> str:
    """Return an identifier of the PID namespace. A container has its own, even under its host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _text(counter: int, renew_s: float, released: bool = False) -> bytes:
    facts = {
        "machine": machine(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": created_at(os.getpid()),
        "counter": counter,
        "renew_s": renew_s,
        "released": released,
    }
    return (json.dumps(facts) + "\n").encode()


def _read(storage: Storage, number: int) -> dict[str, Any]:
    try:
        found = json.loads(storage.read(_file(number)))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(facts: dict[str, Any]) -> bool:
    """True if the process that wrote this is alive; compares creation times, because PIDs are reused."""
    created = created_at(int(facts["pid"]))
    return created is not None and abs(created - float(facts["began"] or 0.0)) <= SLACK_S


def _holder(facts: dict[str, Any]) -> str:
    return f"process {facts.get('pid')} on {facts.get('host')}"


def _file(number: int) -> str:
    return f"{LEASES}/{number:04d}.json"
