"""Record of one start of a job in the run folder, written by the nodes and read by the restart policy."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from everstep.launch.job_start.allocation import Allocation
from everstep.outcome import Ending
from everstep.run_folder import RESTARTS, STARTS, RunFolder

LEAST_SKEW_S = 1.0
"""Seconds of clock difference that may be the file server's delay."""
POLL_S, POLL_REMOTE_S = 0.2, 1.0
"""Seconds between two polls for the head's address; the second in a store, where many nodes poll."""


@dataclass(frozen=True)
class NodeReport:
    """State of one node; written after its checks, and again at its end."""

    host: str
    failed: tuple[str, ...] = ()
    """Checks that failed, one line each."""
    code: int | None = None
    """Exit code of the node's ranks; None while it runs, and for good if the node is lost."""
    stopped: str | None = None
    """The signal that stopped the node."""
    cause: str | None = None
    """Name of the first cause in job.causes that matched the output."""
    line: str = ""
    """Line of output that matched."""
    time: float = 0.0
    """Seconds since the epoch."""
    ending: dict[str, Any] | None = None
    """Ending that the run folder did not accept, as in `Ending.to_json`."""

    @property
    def said(self) -> Ending | None:
        """The parsed `ending`; None if there is none or it cannot be read."""
        try:
            return None if self.ending is None else Ending.from_json(json.dumps(self.ending).encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass
class Start:
    """One start of a job: the folder starts/NNNN."""

    folder: RunFolder
    number: int
    _facts: dict[str, Any] = field(default_factory=dict)
    _last_words: dict[str, NodeReport] = field(default_factory=dict, compare=False)
    """Final reports, by file name; these do not change any more."""
    _missed_at: float | None = field(default=None, compare=False)
    """Time by this node's clock of the last poll that did not find the head's address."""

    @property
    def starter(self) -> str:
        """Starter in the claims of the attempts of this start."""
        return f"start-{self.number:04d}"

    @staticmethod
    def claim(folder: RunFolder, allocation: Allocation, step: int | None) -> Start:
        """Claim the next number, create-only, so that two starts never share one.

        Args:
            step: step of the newest checkpoint.
        """
        facts = {
            "scheduler": allocation.scheduler,
            "job": allocation.job,
            "restart": allocation.restart,
            "hosts": list(allocation.hosts),
            "step": step,
            "time": time.time(),
        }
        number = max(Start.numbers(folder), default=0) + 1
        while not folder.storage.create(f"{STARTS}/{number:04d}/start.json", _json(facts)):
            number += 1
        return Start(folder, number)

    @staticmethod
    def numbers(folder: RunFolder) -> list[int]:
        return sorted(int(name) for name in folder.storage.names(STARTS) if name.isdigit())

    @staticmethod
    def newest(folder: RunFolder) -> Start | None:
        numbers = Start.numbers(folder)
        return Start(folder, numbers[-1]) if numbers else None

    def is_left_behind(self) -> bool:
        """True if the same job has started again since: this node was disconnected, or is about to be ended."""
        newest = Start.newest(self.folder)
        return newest is not None and newest.number > self.number and newest.facts["job"] == self.facts["job"]

    def path(self, name: str) -> str:
        return f"{STARTS}/{self.number:04d}/{name}"

    @property
    def facts(self) -> dict[str, Any]:
        """Facts as written by `claim`."""
        if not self._facts:
            self._facts = json.loads(self.folder.storage.read(self.path("start.json")))
        return self._facts

    def report(self, report: NodeReport) -> None:
        self.folder.storage.write(self.path(f"node-{report.host}.json"), _json({**asdict(report), "time": time.time()}))

    def reports(self) -> list[NodeReport]:
        """Return the reports of all nodes that have written one, by time of the last write."""
        names = [name for name in self.folder.storage.names(self.path("")) if name.startswith("node-")]
        return sorted(map(self._read, names), key=lambda report: report.time)

    def _read(self, name: str) -> NodeReport:
        if name in self._last_words:
            return self._last_words[name]
        facts = json.loads(self.folder.storage.read(self.path(name)))
        report = NodeReport(**{**facts, "failed": tuple(facts["failed"])})
        if report.code is not None or report.failed:
            self._last_words[name] = report
        return report

    def announce(self, endpoint: str, nproc: int) -> None:
        """Publish the rendezvous endpoint, the processes and the clock of the head node."""
        facts = {
            "endpoint": endpoint,
            "nproc": nproc,
            "time": time.time(),
            "ahead_of_folder_s": self.ahead_of_folder_s(),
        }
        self.folder.storage.write(self.path("head.json"), _json(facts))

    def await_head(self, wait: Callable[[float], bool], deadline_s: float) -> str | None:
        """Return the rendezvous endpoint; None after the deadline, or as soon as `wait` is False (a stop)."""
        deadline = time.monotonic() + deadline_s
        pause_s = POLL_S if self.folder.storage.path() is not None else POLL_REMOTE_S
        while time.monotonic() < deadline:
            began = time.time()
            try:
                endpoint: str = json.loads(self.folder.storage.read(self.path("head.json")))["endpoint"]
                return endpoint
            except FileNotFoundError:
                self._missed_at = began
                if not wait(pause_s):
                    return None
        return None

    def processes_of_head(self) -> int | None:
        """Return the number of processes that the head node starts; None if it has not said."""
        found = self.folder.facts(self.path("head.json")).get("nproc")
        return found if isinstance(found, int) else None

    def ahead_of_head_s(self) -> float:
        """Return the least number of seconds by which this clock is ahead of the head's; negative if behind.

        The head wrote its time after our last poll without a result and before now, which bounds the difference. If a
        file server has stamped files of both nodes, its clock gives the difference, also for a node that was late.
        """
        head, ours = self.folder.facts(self.path("head.json")), self.ahead_of_folder_s()
        theirs, at = head.get("ahead_of_folder_s"), head.get("time")
        if ours is not None and theirs is not None and abs(ours - theirs) >= LEAST_SKEW_S:
            return float(ours - theirs)
        if at is None:
            return 0.0
        return _nearest_to_0(float("-inf") if self._missed_at is None else self._missed_at - at, time.time() - at)

    def ahead_of_folder_s(self) -> float | None:
        """Return the seconds by which our clock is ahead of the clock that stamps files; None without one."""
        probe = self.folder.storage.path(self.path(f"clock-{socket.gethostname()}-{os.getpid()}"))
        if probe is None:
            return None
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            began = time.time()
            probe.write_bytes(b"")
            ended, stamped = time.time(), probe.stat().st_mtime
            probe.unlink()
        except OSError:  # another check reports this error
            return None
        return _nearest_to_0(began - stamped, ended - stamped)


def _nearest_to_0(least: float, most: float) -> float:
    """Return the number between `least` and `most` that is nearest to 0."""
    return max(0.0, least) or min(0.0, most)


@dataclass
class Decisions:
    """Decisions of the restart policy, for repeated queries: each is written once, so it is read once."""

    folder: RunFolder
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, start: Start) -> dict[str, Any] | None:
        """Return the decision after a start; None if there is none."""
        if (found := self._among_known(start)) is None:
            for name in self.folder.storage.names(RESTARTS):
                if name not in self._known:
                    self._known[name] = json.loads(self.folder.storage.read(f"{RESTARTS}/{name}"))
            found = self._among_known(start)
        return found

    def _among_known(self, start: Start) -> dict[str, Any] | None:
        return next((each for each in self._known.values() if each.get("start") == start.number), None)


def decisions(folder: RunFolder) -> list[dict[str, Any]]:
    """Return all decisions of the restart policy, the oldest first."""
    return [json.loads(folder.storage.read(f"{RESTARTS}/{name}")) for name in folder.storage.names(RESTARTS)]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
