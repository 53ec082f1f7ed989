"""Names of all files in a run folder, and the rules for writing there."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from everstep.checked_json import mapping, parse, whole
from everstep.config import RunConfig
from everstep.errors import CheckpointError, ConfigError, SupersededError, printable
from everstep.outcome import Ending, Fault, Outcome, to_json_line
from everstep.storage import Storage, join_url, lines, open_storage, probe, read_limited
from everstep.superseded_checkpoints import Lineage

CONFIG = "config.yaml"
RUN_ID = "run_id"
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
"""NNNN.json is the intent of a submission, NNNN.handle.json the job that it became."""
STARTS = "starts"
"""NNNN/ is one job start: its hosts and the state of its nodes. It covers zero or more attempts."""
MEMBERS = "members"
"""JOB/INDEX-NNNN.json: successive pods of each index of a job on Kubernetes."""
CODE = "code"
"""DIGEST.tar.gz: snapshot of the user's checkout at a submission."""
TENSORBOARD = "tensorboard"
WANDB = "wandb"
MLFLOW = "mlflow"
EVALUATIONS, RESULT = "evaluations", "result.json"
EXPLANATIONS = "explain"
RESULTS = (EVALUATIONS, EXPLANATIONS)
OF_VERBS = REPLAYS, EXCLUSIONS = "replays", "exclusions"
"""NNNN/ has config and result of one `evaluate`; NNNN.json is one `replay`, or one `data exclude`."""
PROJECT = "project"
TASK_MODULE = f"{PROJECT}/run_task.py"
"""Module, data and config of a run that Python code started with `everstep.train`."""
NESTED = (ATTEMPTS, CHECKPOINTS, RESTARTS, SUBMISSIONS, STARTS, MEMBERS, CODE, *RESULTS, *OF_VERBS, PROJECT)
"""Folders of a run folder; neither they nor an entry of them may be a link."""
FILES = (CONFIG, RUN_ID, JOB, PROVENANCE, DATA, PROGRESS, STOP_MARKER, TENSORBOARD, WANDB, MLFLOW)
"""Other parts of a run folder, which may be no links either; W&B makes some in its own."""
LARGEST_RECORD = 16 << 20
"""Bytes of a JSON record."""
LOOKED_BACK = 8
"""Earlier attempts that are searched for the same error of the user's code."""
METRICS = "metrics.jsonl"
MEDIA = "media.jsonl"
PICTURES = "media"
"""Folder of an attempt: PNG files, which its media.jsonl names."""
EVENTS = "events.jsonl"
NODES = "nodes"
"""Folder of an attempt: NNNN.jsonl has the figures of one node."""
GRACE = "EVERSTEP_GRACE_S"
"""Environment variable of the launcher: grace period in seconds, from the stop signal to the kill."""
STARTER = "EVERSTEP_STARTER"
"""Environment variable: id of the launcher, recorded in the claim, so that it recognizes its attempts."""

ENDING_FILE = "EVERSTEP_ENDING_FILE"
"""Environment variable: file in the launcher's memory for an outcome that the run folder refused."""


def profile_request(folder: RunFolder, attempt: int, rank: int) -> str:
    """Return the name of the file that asks a rank of an attempt for a profile."""
    return folder.attempt(attempt, f"profile-rank-{rank:04d}.request.json")


@dataclass
class RunFolder:
    """One run on any storage."""

    url: str
    _starts: dict[int, int] = field(init=False, default_factory=dict)
    """Attempt → step that it restored. Each is written once, so it is read once."""

    @cached_property
    def storage(self) -> Storage:
        """Return the storage, once the folder is known to have no links.

        Raises:
            ConfigError: a part of the run folder is a link, through which other files would be read, or removed.
        """
        storage = open_storage(self.url)
        if (root := storage.path()) is not None and (link := _link_in(root)) is not None:
            raise ConfigError(
                f"{self.url}: {link} is a link to {printable(os.readlink(root / link))}; a run folder holds its own "
                "files: put them there, or remove the link"
            )
        return storage

    @staticmethod
    def of(run_root: str, run: str) -> RunFolder:
        return RunFolder(join_url(run_root, run))

    def attempt(self, number: int, name: str = "") -> str:
        return f"{ATTEMPTS}/{number:04d}/{name}".rstrip("/")

    def checkpoint(self, step: int, attempt: int) -> str:
        # The attempt is part of the name, so that two attempts never write into one folder.
        return f"{CHECKPOINTS}/step-{step:08d}-attempt-{attempt:04d}"

    def newest_step(self) -> int | None:
        """Return the highest step with a committed checkpoint, without verifying its files."""
        steps = {name: int(name.split("-")[1]) for name in self.storage.names(CHECKPOINTS) if _is_checkpoint(name)}
        for name in sorted(steps, key=lambda name: steps[name], reverse=True):
            if self.storage.exists(f"{CHECKPOINTS}/{name}/{MANIFEST}"):
                return steps[name]
        return None

    def reached_step(self) -> int:
        """Return the step that the run is known to have reached.

        A checkpoint of the node tier counts only once an attempt has restored it.
        """
        return max([self.newest_step() or 0, *self.lineage().restored.values()])

    def record_restart(self, facts: dict[str, Any]) -> None:
        """Record one decision of the restart policy, as a separate object, since object stores cannot append."""
        number = len(self.storage.names(RESTARTS)) + 1
        while not self.storage.create(f"{RESTARTS}/{number:04d}.json", to_json_line({"time": time.time(), **facts})):
            number += 1

    def attempts(self) -> list[int]:
        return sorted(int(name) for name in self.storage.names(ATTEMPTS) if name.isdigit())

    def claim(self, facts: dict[str, Any]) -> int:
        """Claim the next attempt number, by a create-only write, so that two starters get different numbers.

        StorageError when the store does not honour create-only writes; a probe checks this.
        """
        probe(self.storage)
        number = max(self.attempts(), default=0) + 1
        who = {"host": socket.gethostname(), "pid": os.getpid(), "starter": os.environ.get(STARTER)}
        record = {**facts, **who, "time": time.time()}
        while not self.storage.create(self.attempt(number, "claim.json"), to_json_line({**record, "attempt": number})):
            number += 1
        return number

    def starter(self, attempt: int) -> str | None:
        """Return the id of the launcher's start that made an attempt; None when unknown (yet)."""
        return self._claimed(attempt, "starter")

    def host(self, attempt: int) -> str | None:
        """Return the host that claimed an attempt; None when unknown."""
        return self._claimed(attempt, "host")

    def _claimed(self, attempt: int, key: str) -> str | None:
        value = self.claim_of(attempt).get(key)
        return None if value is None else str(value)

    def claim_of(self, attempt: int) -> dict[str, Any]:
        """Return the claim of an attempt; empty when it cannot be read."""
        return self.facts(self.attempt(attempt, "claim.json"))

    def facts(self, path: str) -> dict[str, Any]:
        """Return a JSON object of the folder; empty when it is missing or damaged. For readers only."""
        try:
            return mapping(self.record(path), path)
        except (FileNotFoundError, ValueError):
            return {}

    def record(self, path: str) -> Any:
        """Return the value of a JSON file of the folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, nested too deeply, or larger than any record.
        """
        return parse(read_limited(self.storage, path, LARGEST_RECORD))

    def lines(self, attempt: int, name: str) -> Iterator[dict[str, Any]]:
        """Yield the records of one attempt's JSON lines, also in parts, without lines truncated by a kill."""
        for file in self.parts(attempt, name):
            for line in lines(self.storage, file):
                try:
                    yield mapping(parse(line), name)
                except ValueError:
                    continue

    def parts(self, attempt: int, name: str) -> list[str]:
        """Return the paths of one attempt's JSON lines, in the order of writing: a file, or parts on a store."""
        folder, _, file = self.attempt(attempt, name).rpartition("/")
        stem, _, suffix = file.rpartition(".")
        found = [each for each in self.storage.names(folder) if each.startswith(stem) and each.endswith(suffix)]
        return [f"{folder}/{each}" for each in found if each == file or each.startswith(f"{stem}-")]

    def check_newest(self, attempt: int) -> None:
        """Raise SupersededError if a later attempt has claimed the run: an older one must not commit."""
        newest = max(self.attempts(), default=attempt)
        if newest > attempt:
            raise SupersededError(
                f"attempt {newest} has taken over {self.url}; attempt {attempt} stops and commits nothing more"
            )

    def record_restored(self, attempt: int, step: int, origin: int) -> None:
        """Record the checkpoint that this attempt restored: its step, and the attempt that wrote it."""
        self.storage.create(self.attempt(attempt, "restored.json"), to_json_line({"step": step, "attempt": origin}))

    def lineage(self) -> Lineage:
        """Return the lineage as it is now, for all checkpoints of one listing."""
        for number in self.attempts():
            if number not in self._starts and (step := self._restored(number)) is not None:
                self._starts[number] = step
        return Lineage(dict(self._starts))

    def _restored(self, attempt: int) -> int | None:
        try:
            restored = mapping(self.record(self.attempt(attempt, "restored.json")), "it")
            return whole(restored.get("step"), "step")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{self.url}/{self.attempt(attempt, 'restored.json')} is damaged: {error}") from error

    def end(self, attempt: int, ending: Ending) -> bool:
        """Record the outcome; return True if this one counts. The first counts: later failures follow from it.

        Exception: the outcome of a rank that merely lost another is replaced by that of the lost rank.
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
        """True if the latest earlier attempt that failed by the user's code ended with the same error."""
        for number in reversed([number for number in self.attempts() if number < attempt][-LOOKED_BACK:]):
            before = self.ending(number)
            if before is not None and before.fault is Fault.user and before.outcome is Outcome.crashed:
                return ending.repeats(before)
        return False

    def ending(self, attempt: int) -> Ending | None:
        """Return the outcome of an attempt; None without a readable one: the attempt then counts as killed."""
        try:
            return Ending.from_json(read_limited(self.storage, self.attempt(attempt, "outcome.json"), LARGEST_RECORD))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def never_trained(self) -> bool:
        """True if all attempts have ended before their first step, so that nothing depends on the config."""
        endings = [self.ending(number) for number in self.attempts()]
        if not endings or self.newest_step() is not None:
            return False
        if any(ending is None or ending.step > 0 for ending in endings):
            return False
        ended = max(ending.time or 0.0 for ending in endings if ending is not None)
        # A job submitted since then may still be queued.
        asked = [self.facts(f"{SUBMISSIONS}/{name}").get("time") for name in self.storage.names(SUBMISSIONS)]
        return all(isinstance(moment, int | float) and moment < ended for moment in asked)

    def last_ending(self) -> Ending | None:
        numbers = self.attempts()
        return self.ending(numbers[-1]) if numbers else None


def meant(url: str) -> str:
    """Return `"; did you mean 'runs/NAME'?"` for a run's name in place of its folder, or an empty string."""
    path = os.path.join(RunConfig().run_root, url)
    is_name = os.sep not in url and url not in ("", os.curdir, os.pardir)
    return f"; did you mean {path!r}?" if is_name and os.path.isdir(path) else ""


def _link_in(root: Path) -> str | None:
    """Return a part of a run folder that is a link, or None."""
    for name in (*NESTED, *FILES):
        if os.path.islink(root / name):
            return name
    for name in NESTED:
        with contextlib.suppress(OSError), os.scandir(root / name) as found:
            for entry in found:
                if entry.is_symlink():
                    return f"{name}/{entry.name}"
    return None


def _is_checkpoint(name: str) -> bool:
    words = name.split("-")
    return len(words) == 4 and words[0] == "step" and words[1].isdigit()
