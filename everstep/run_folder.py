"""Every name in a run's folder, said once, and the few rules about who may write there."""

from __future__ import annotations

import enum
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from everstep.config import RunConfig
from everstep.errors import CheckpointError, SupersededError
from everstep.storage import Storage, join_url, open_storage, probe

CONFIG = "config.yaml"
JOB = "job.yaml"
PROVENANCE = "provenance.json"
DATA = "data.json"
PROGRESS = "progress.json"
STOP_MARKER = "stop"
ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
RESTARTS = "restarts"
SUBMISSIONS = "submissions"
"""NNNN.json says that a job is about to be submitted, NNNN.handle.json which job it became."""
STARTS = "starts"
"""NNNN/ is one start by a scheduler: where it ran, how its nodes fared. It holds none, one or more attempts."""
MEMBERS = "members"
"""JOB/INDEX-NNNN.json: the pods that a job on Kubernetes has had, of each index one after the other."""
CODE = "code"
"""DIGEST.tar.gz: what the user's checkout held when a job was submitted."""
LOOKED_BACK = 8
"""Attempts among which an error of the user's code is looked for that has come before."""
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
GRACE = "EVERSTEP_GRACE_S"
"""Environment variable: seconds between the word to stop and the kill, from whoever would kill."""
STARTER = "EVERSTEP_STARTER"
"""Environment variable: who started this process. It stands in the claim, so a launcher knows its own attempts."""

ENDING_FILE = "EVERSTEP_ENDING_FILE"
"""Environment variable: a file in the launcher's memory, for an ending that the run folder has not taken."""


class Outcome(enum.Enum):
    """Why an attempt ended. torchrun flattens exit codes to 1, so this stands in a file."""

    done = "done"
    preempted = "preempted"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    config_error = "config_error"
    superseded = "superseded"
    crashed = "crashed"

    @property
    def exit_code(self) -> int:
        return {"done": 0, "config_error": 2, "diverged": 3, "superseded": 4, "preempted": 75}.get(self.value, 1)


class Fault(enum.Enum):
    """Whose fault it is that an attempt failed; the policy of restarts reads it."""

    machine = "machine"
    """A lost rank, a store, memory, a device, a signal: another start may fare better."""
    user = "user"
    """An exception of Python or torch. Before the first step, or twice at one step, it is a mistake."""
    left = "left"
    """The user has left the debugger."""


@dataclass(frozen=True)
class Ending:
    """The outcome of an attempt with what the next one, and the user, must know."""

    outcome: Outcome
    step: int = 0
    reason: str = ""
    micro_batch: int | None = None
    """After out_of_memory: the size that the next attempt should use."""
    rank: int = 0
    """Who says so."""
    time: float | None = field(default=None, compare=False)
    """When it was written down, in seconds since the epoch."""
    fault: Fault = Fault.machine
    error: str = ""
    """Type of the exception; empty where there was none."""
    place: str = ""
    """Line of the user's code that raised it."""
    lost_peer: bool = False
    """Said by a rank that lost another one: what is known of that one takes its place."""
    patience: int | None = None
    """The `evaluate.patience` that ended the run before its last step."""

    def repeats(self, earlier: Ending) -> bool:
        """True when both are the same error of the user's code at the same step."""
        both = (self, earlier)
        if any(each.fault is not Fault.user or each.outcome is not Outcome.crashed for each in both):
            return False
        mine, other = ((each.step, each.error, each.place or each.reason) for each in both)
        return mine == other

    def is_done(self, steps: int, patience: int | None) -> bool:
        """True if a run of so many steps, with this patience, has nothing left to do."""
        early = self.patience is not None and self.patience == patience
        return self.outcome is Outcome.done and (self.step >= steps or early)

    def to_json(self) -> bytes:
        return _json({**asdict(self), "outcome": self.outcome.value, "fault": self.fault.value})

    @staticmethod
    def from_json(data: bytes) -> Ending:
        facts = json.loads(data)
        fault = Fault(facts.get("fault", Fault.machine.value))
        return Ending(**{**facts, "outcome": Outcome(facts["outcome"]), "fault": fault})


@dataclass
class RunFolder:
    """One run on any storage."""

    url: str
    storage: Storage = field(init=False)
    _starts: dict[int, int] = field(init=False, default_factory=dict)
    """For attempts that have restored: from which step. Written once, so read once."""

    def __post_init__(self) -> None:
        self.storage = open_storage(self.url)

    @staticmethod
    def of(run_root: str, run: str) -> RunFolder:
        return RunFolder(join_url(run_root, run))

    def attempt(self, number: int, name: str = "") -> str:
        return f"{ATTEMPTS}/{number:04d}/{name}".rstrip("/")

    def checkpoint(self, step: int, attempt: int) -> str:
        # The attempt is part of the name, so two attempts never write into one folder.
        return f"{CHECKPOINTS}/step-{step:08d}-attempt-{attempt:04d}"

    def newest_step(self) -> int | None:
        """The highest step with a committed checkpoint; its files are not verified here."""
        steps = {name: int(name.split("-")[1]) for name in self.storage.names(CHECKPOINTS) if _is_checkpoint(name)}
        for name in sorted(steps, key=lambda name: steps[name], reverse=True):
            if self.storage.exists(f"{CHECKPOINTS}/{name}/{MANIFEST}"):
                return steps[name]
        return None

    def reached_step(self) -> int:
        """How far the run is known to have come; what lay on the nodes is known when an attempt has gone on from it."""
        self.limits()
        return max([self.newest_step() or 0, *self._starts.values()])

    def record_restart(self, facts: dict[str, Any]) -> None:
        """Keep one decision of the restart policy: an object of its own, since object stores cannot append."""
        number = len(self.storage.names(RESTARTS)) + 1
        while not self.storage.create(f"{RESTARTS}/{number:04d}.json", _json({"time": time.time(), **facts})):
            number += 1

    def attempts(self) -> list[int]:
        return sorted(int(name) for name in self.storage.names(ATTEMPTS) if name.isdigit())

    def claim(self, facts: dict[str, Any]) -> int:
        """Take the next attempt number: create-only, so of two starters each gets its own.

        StorageError when the store does not keep to create-only writes, found out by a probe of it.
        """
        probe(self.storage)
        number = max(self.attempts(), default=0) + 1
        who = {"host": socket.gethostname(), "pid": os.getpid(), "starter": os.environ.get(STARTER)}
        record = {**facts, **who, "time": time.time()}
        while not self.storage.create(self.attempt(number, "claim.json"), _json({**record, "attempt": number})):
            number += 1
        return number

    def starter(self, attempt: int) -> str | None:
        """Who started an attempt; None when it is not known (yet)."""
        return self._claimed(attempt, "starter")

    def host(self, attempt: int) -> str | None:
        """The machine that claimed an attempt; None when it is not known."""
        return self._claimed(attempt, "host")

    def _claimed(self, attempt: int, key: str) -> str | None:
        value = self.claim_of(attempt).get(key)
        return None if value is None else str(value)

    def claim_of(self, attempt: int) -> dict[str, Any]:
        """What an attempt said of itself as it began; empty when it is not known."""
        return self.facts(self.attempt(attempt, "claim.json"))

    def facts(self, path: str) -> dict[str, Any]:
        """A JSON object of the folder for somebody who only looks; empty when it is not there or cannot be read."""
        try:
            found = json.loads(self.storage.read(path))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def lines(self, attempt: int, name: str) -> Iterator[dict[str, Any]]:
        """The records of one attempt's JSON lines, or of the parts of them; what a kill cut short is left out."""
        stem, _, suffix = name.rpartition(".")
        for file in self.storage.names(self.attempt(attempt)):
            if file == name or (file.startswith(f"{stem}-") and file.endswith(suffix)):
                for line in self.storage.read(self.attempt(attempt, file)).splitlines():
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue

    def check_newest(self, attempt: int) -> None:
        """Raise SupersededError when a later attempt has claimed the run: an older one may not commit."""
        newest = max(self.attempts(), default=attempt)
        if newest > attempt:
            raise SupersededError(
                f"attempt {newest} has taken over {self.url}; attempt {attempt} stops and commits nothing more"
            )

    def record_restored(self, attempt: int, step: int, origin: int) -> None:
        """Say from which checkpoint (step, and the attempt that wrote it) this attempt goes on."""
        self.storage.create(self.attempt(attempt, "restored.json"), _json({"step": step, "attempt": origin}))

    def limits(self) -> dict[int, int]:
        """For each attempt the highest step whose checkpoint counts: what its successors went on from.

        A writer that was cut off may still commit after its successor has started. Such a checkpoint is not part
        of the run's line, because the run has gone on from an earlier one.
        """
        attempts = self.attempts()
        for number in attempts:
            if number not in self._starts and (step := self._restored(number)) is not None:
                self._starts[number] = step
        return {
            number: min((step for later, step in self._starts.items() if later > number), default=2**62)
            for number in attempts
        }

    def _restored(self, attempt: int) -> int | None:
        try:
            return int(json.loads(self.storage.read(self.attempt(attempt, "restored.json")))["step"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.url}/{self.attempt(attempt, 'restored.json')} is damaged: {error}") from error

    def end(self, attempt: int, ending: Ending) -> bool:
        """Write the outcome; the first stands, since a rank that fails later fails because of it.

        A rank that merely lost another may be faster than what is known of that one, which then takes its place.
        Returns whether this one is the outcome now.
        """
        said = replace(ending, time=time.time())
        path = self.attempt(attempt, "outcome.json")
        if self.storage.create(path, said.to_json()):
            return True
        before = self.ending(attempt)
        if ending.lost_peer or before is None or not before.lost_peer:
            return False
        self.storage.write(path, said.to_json())
        return True

    def has_stepped(self) -> bool:
        """True if a step of this run is known to have succeeded, in any attempt."""
        step = self.facts(PROGRESS).get("step", 0)
        return (isinstance(step, int) and step > 0) or self.reached_step() > 0

    def is_repeated(self, attempt: int, ending: Ending) -> bool:
        """True if the error that ended an attempt is that of the newest one before it that ended by the user's code."""
        for number in reversed([number for number in self.attempts() if number < attempt][-LOOKED_BACK:]):
            before = self.ending(number)
            if before is not None and before.fault is Fault.user and before.outcome is Outcome.crashed:
                return ending.repeats(before)
        return False

    def ending(self, attempt: int) -> Ending | None:
        """How an attempt ended; None when it has not, or when its word cannot be read: then it counts as killed."""
        try:
            return Ending.from_json(self.storage.read(self.attempt(attempt, "outcome.json")))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def never_trained(self) -> bool:
        """True when all that was ever started has ended, and before its first step: nothing rests on its config."""
        endings = [self.ending(number) for number in self.attempts()]
        if not endings or self.newest_step() is not None:
            return False
        if any(ending is None or ending.step > 0 for ending in endings):
            return False
        ended = max(ending.time or 0.0 for ending in endings if ending is not None)
        # A job that was submitted since then may still be in the queue.
        asked = [self.facts(f"{SUBMISSIONS}/{name}").get("time") for name in self.storage.names(SUBMISSIONS)]
        return all(moment is not None and moment < ended for moment in asked)

    def last_ending(self) -> Ending | None:
        numbers = self.attempts()
        return self.ending(numbers[-1]) if numbers else None


def meant(url: str) -> str:
    """`"; did you mean 'runs/NAME'?"` for a run's name where its folder is asked for, or an empty string."""
    path = os.path.join(RunConfig().run_root, url)
    is_name = os.sep not in url and url not in ("", os.curdir, os.pardir)
    return f"; did you mean {path!r}?" if is_name and os.path.isdir(path) else ""


def _is_checkpoint(name: str) -> bool:
    words = name.split("-")
    return len(words) == 4 and words[0] == "step" and words[1].isdigit()


def progress_json(facts: dict[str, Any]) -> bytes:
    return _json(facts)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
