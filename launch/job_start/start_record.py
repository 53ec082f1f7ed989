"""One start of a job by its scheduler, as the nodes and the policy of restarts write it down in the run folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from everstep.launch.job_start.allocation import Allocation
from everstep.run_folder import RESTARTS, STARTS, Ending, RunFolder

LEAST_SKEW_S = 1.0
"""Seconds between two clocks that may be the file server's delay."""
POLL_S, POLL_REMOTE_S = 0.2, 1.0
"""Seconds between two looks for the word of the head; the second in a store, which a hundred nodes may ask at once."""


@dataclass(frozen=True)
class NodeReport:
    """How one node fared; written after its checks, and once more at its end."""

    host: str
    failed: tuple[str, ...] = ()
    """Checks that failed, one line each."""
    code: int | None = None
    """Exit code of the node's torchrun; None while it runs, and for ever when the node is lost."""
    stopped: str | None = None
    """The signal by which the node was told to stop."""
    cause: str | None = None
    """Which of job.causes was seen in what the processes printed."""
    line: str = ""
    """Where it was seen."""
    time: float = 0.0
    """Seconds since the epoch."""
    ending: dict[str, Any] | None = None
    """The ending that the run folder has not taken, as `Ending.to_json` gives it."""

    @property
    def said(self) -> Ending | None:
        """That ending; None where there is none, or none that can be read."""
        try:
            return None if self.ending is None else Ending.from_json(json.dumps(self.ending).encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass
class Start:
    """The folder starts/NNNN."""

    folder: RunFolder
    number: int
    _facts: dict[str, Any] = field(default_factory=dict)
    _last_words: dict[str, NodeReport] = field(default_factory=dict, compare=False)
    """Reports after which none of that node comes."""
    _missed_at: float | None = field(default=None, compare=False)
    """When the head was last looked for in vain, by this node's clock."""

    @property
    def starter(self) -> str:
        """What stands in the claims of the attempts of this start."""
        return f"start-{self.number:04d}"

    @staticmethod
    def claim(folder: RunFolder, allocation: Allocation, step: int | None) -> Start:
        """The next number, create-only, so of two starts each gets its own; `step` is that of the newest checkpoint."""
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
        """The same job has started again since: this one is on a node that was cut off, or about to be ended."""
        newest = Start.newest(self.folder)
        return newest is not None and newest.number > self.number and newest.facts["job"] == self.facts["job"]

    def path(self, name: str) -> str:
        return f"{STARTS}/{self.number:04d}/{name}"

    @property
    def facts(self) -> dict[str, Any]:
        """What `claim` wrote."""
        if not self._facts:
            self._facts = json.loads(self.folder.storage.read(self.path("start.json")))
        return self._facts

    def report(self, report: NodeReport) -> None:
        self.folder.storage.write(self.path(f"node-{report.host}.json"), _json({**asdict(report), "time": time.time()}))

    def reports(self) -> list[NodeReport]:
        """Of all nodes that have said something, by the time of their last word."""
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

    def announce(self, endpoint: str) -> None:
        """The head node says where all meet, and what its clock shows."""
        facts = {"endpoint": endpoint, "time": time.time(), "ahead_of_folder_s": self.ahead_of_folder_s()}
        self.folder.storage.write(self.path("head.json"), _json(facts))

    def await_head(self, wait: Callable[[float], bool], deadline_s: float) -> str | None:
        """Where all meet; None when the head has not said it in time, or when `wait` says that we are to stop."""
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

    def ahead_of_head_s(self) -> float:
        """Return by how many seconds, at least, this node's clock is ahead of the head's; behind it: less than 0.

        The head wrote after our last look in vain, and before now. And the clock of a file server has stamped files of
        both nodes, which tells of a node that was late as well.
        """
        head, ours = self.folder.facts(self.path("head.json")), self.ahead_of_folder_s()
        theirs, at = head.get("ahead_of_folder_s"), head.get("time")
        if ours is not None and theirs is not None and abs(ours - theirs) >= LEAST_SKEW_S:
            return float(ours - theirs)
        if at is None:
            return 0.0
        return _nearest_to_0(float("-inf") if self._missed_at is None else self._missed_at - at, time.time() - at)

    def ahead_of_folder_s(self) -> float | None:
        """Return by how much our clock is ahead of that which stamps files of the run folder; None if none does."""
        probe = self.folder.storage.path(self.path(f"clock-{socket.gethostname()}-{os.getpid()}"))
        if probe is None:
            return None
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            began = time.time()
            probe.write_bytes(b"")
            ended, stamped = time.time(), probe.stat().st_mtime
            probe.unlink()
        except OSError:  # another check has told of it
            return None
        return _nearest_to_0(began - stamped, ended - stamped)


def _nearest_to_0(least: float, most: float) -> float:
    """Return the number between two others that is nearest to 0."""
    return max(0.0, least) or min(0.0, most)


@dataclass
class Decisions:
    """Those of the policy of restarts, for somebody who asks again and again: each is written once, and read once."""

    folder: RunFolder
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, start: Start) -> dict[str, Any] | None:
        """What was decided after a start; None when nothing has been."""
        if (found := self._among_known(start)) is None:
            for name in self.folder.storage.names(RESTARTS):
                if name not in self._known:
                    self._known[name] = json.loads(self.folder.storage.read(f"{RESTARTS}/{name}"))
            found = self._among_known(start)
        return found

    def _among_known(self, start: Start) -> dict[str, Any] | None:
        return next((each for each in self._known.values() if each.get("start") == start.number), None)


def decisions(folder: RunFolder) -> list[dict[str, Any]]:
    """All decisions of the policy of restarts, the oldest first."""
    return [json.loads(folder.storage.read(f"{RESTARTS}/{name}")) for name in folder.storage.names(RESTARTS)]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
