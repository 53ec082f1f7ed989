"""Save and restore the state of a run: rank 0 decides, all ranks move bytes, the manifest commits."""

from __future__ import annotations

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from trainer.checkpoint.dcp_io import Reader, Writer, read_metadata
from trainer.checkpoint.manifest import (
    Candidate,
    FileRecord,
    Manifest,
    candidates,
    check_format,
    damage,
    newest,
    set_aside,
    was_set_aside,
)  # fmt: skip
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.survey import split_url
from trainer.compose import digest
from trainer.config import Goal, RunConfig
from trainer.errors import CheckpointError, DataError, EverstepError
from trainer.mesh import Mesh
from trainer.run_folder import MANIFEST, PROGRESS, RunFolder
from trainer.state import Progress, TrainState


@dataclass(frozen=True)
class Restored:
    """What a start goes on from, and why that one."""

    step: int
    attempt: int
    why: str
    walked_past: tuple[str, ...] = ()


class Checkpointer:
    """The checkpoints of one attempt at a run."""

    def __init__(
        self, run: RunConfig, folder: RunFolder, attempt: int, mesh: Mesh, state: TrainState, data_digest: str
    ) -> None:
        self.run = run
        self.folder = folder
        self.attempt = attempt
        self.mesh = mesh
        self.state = state
        self.data_digest = data_digest
        self.retention = Retention(folder, attempt, run.checkpoint, run.evaluate.goal is Goal.max)
        self.saved_step = -1
        """The step of the newest checkpoint that this attempt restored or wrote."""
        self.seconds = 0.0
        """Time that training stood still for checkpoints."""

    def due(self, step: int) -> bool:
        return step > 0 and step % self.run.checkpoint.every == 0 and step != self.saved_step

    def save(self) -> None:
        """Write and commit the state; SupersededError when a newer attempt owns the run."""
        start = time.perf_counter()
        step = self.state.progress.step
        path = self.folder.checkpoint(step, self.attempt)
        self.mesh.decide(lambda: self.folder.check_newest(self.attempt))
        writer = Writer(self.folder.storage, path, self.mesh.rank)
        with plain_errors(f"{self.folder.url}/{path}"):
            save(self.state.tensors(), storage_writer=writer, no_dist=self.mesh.world == 1)
        self.mesh.decide(lambda: self._commit(path, writer.files))
        self.saved_step = step
        self.seconds += time.perf_counter() - start

    def restore(self) -> Restored | None:
        """Load the newest checkpoint of the run that verifies; None when the run has none yet.

        Damaged ones are walked past and, once a good one is loaded, set aside. With none left good nothing is
        touched, and CheckpointError says what is wrong with each.
        """
        bad: list[tuple[Candidate, str]] = []
        found = self.mesh.decide(lambda: list(candidates(self.folder)))
        for place, candidate in enumerate(found):
            check_format(self.folder, candidate)
            fault = candidate.damage or self._damage(candidate)
            if not fault and candidate.manifest is not None:
                self._load(candidate.path, candidate.manifest)
                self.mesh.decide(functools.partial(self._accept, found[place:], bad))
                walked = tuple(f"{c.path}: {why}" for c, why in bad)
                why = "the newest" if not bad else f"the newest that verifies; {len(bad)} damaged"
                return Restored(candidate.step, candidate.attempt, why, walked)
            bad.append((candidate, fault))
        self.mesh.decide(lambda: self._check_new(bad))
        return None

    def reload(self) -> int:
        """Go back to the newest checkpoint of this attempt's line; returns its step (rollback)."""
        candidate = self.mesh.decide(lambda: newest(self.folder))
        if candidate.manifest is not None:
            self._load(candidate.path, candidate.manifest)
        return candidate.step

    def _accept(self, good: list[Candidate], bad: list[tuple[Candidate, str]]) -> None:
        """Args: good: the restored one and all before it; bad: what was walked past."""
        for damaged, _ in bad:
            set_aside(self.folder, damaged)
        self.folder.record_restored(self.attempt, good[0].step, good[0].attempt)
        self.retention.found(good)

    def _check_new(self, bad: list[tuple[Candidate, str]]) -> None:
        """Make sure that a run without a good checkpoint never had one, before it starts from nothing."""
        found = [f"{candidate.path}: {why}" for candidate, why in bad]
        found += [f"{path}: set aside" for path in was_set_aside(self.folder)]
        if found or self._was_saved():
            raise CheckpointError(
                f"{self.folder.url} had checkpoints, but none can be restored ({'; '.join(found) or 'all are gone'}); "
                "nothing was deleted; start another run, from 'init_from' if you like"
            )
        self.folder.record_restored(self.attempt, 0, 0)

    def _was_saved(self) -> bool:
        try:
            return bool(json.loads(self.folder.storage.read(PROGRESS)).get("checkpoint_step"))
        except (FileNotFoundError, ValueError):
            return False

    def _damage(self, candidate: Candidate) -> str:
        """What is wrong with a checkpoint's files, each read by one of the ranks."""
        if candidate.manifest is None:
            return candidate.damage
        files = sorted(candidate.manifest.files.items())[self.mesh.rank :: self.mesh.world]
        faults = self.mesh.gather(damage(self.folder.storage, candidate.path, files))
        return "; ".join(fault for fault in faults if fault)

    def _load(self, path: str, manifest: Manifest) -> None:
        if manifest.data_digest != self.data_digest:
            raise DataError(
                f"{self.folder.url}/{path} was trained on another dataset (digest {manifest.data_digest[:12]}, "
                f"now {self.data_digest[:12]}); put the old one back, or start a new run"
            )
        try:
            progress = Progress(**manifest.progress)
        except TypeError as error:
            raise CheckpointError(f"{self.folder.url}/{path}: progress is not this version's: {error}") from error
        storage = self.folder.storage
        tensors = self.state.prepare(read_metadata(storage, path), manifest.scalars)
        with plain_errors(f"{self.folder.url}/{path}"):
            load(tensors, storage_reader=Reader(storage, path), no_dist=self.mesh.world == 1)
        self.state.progress = progress
        self.saved_step = manifest.step

    def _commit(self, path: str, files: dict[str, FileRecord]) -> None:
        self.folder.check_newest(self.attempt)
        for name, record in files.items():
            size = self.folder.storage.size(f"{path}/{name}")
            if size != record.bytes:
                raise CheckpointError(f"{self.folder.url}/{path}/{name} has {size} bytes, {record.bytes} were written")
        manifest = self._manifest(files)
        if not self.folder.storage.create(f"{path}/{MANIFEST}", manifest.to_json()):
            raise CheckpointError(f"{self.folder.url}/{path} was committed by another process")
        self.retention.committed(path, manifest)

    def _manifest(self, files: dict[str, FileRecord]) -> Manifest:
        progress = self.state.progress
        return Manifest(
            step=progress.step,
            attempt=self.attempt,
            samples=progress.samples(self.run.global_batch),
            world=self.mesh.world,
            parallel=self.run.parallel.kind.value,
            time=time.time(),
            config_digest=digest(self.run),
            data_digest=self.data_digest,
            progress=self.state.numbers(),
            scalars=self.state.scalars(),
            metric=progress.metric if progress.evaluated == progress.step else None,
            files=files,
        )


def locate(url: str) -> tuple[RunFolder, str]:
    """(run folder, path in it) of a verified checkpoint: the one that the URL names, or the newest of the run."""
    head, name = split_url(url)
    run = RunFolder(head)
    for candidate in candidates(run) if name else []:
        if candidate.path.endswith(f"/{name}"):
            fault = candidate.damage
            if candidate.manifest is not None:
                fault = damage(run.storage, candidate.path, candidate.manifest.files.items())
            if fault:
                raise CheckpointError(f"{url}: {fault}")
            return run, candidate.path
    if name:
        raise CheckpointError(f"{url} is not a checkpoint: it has no manifest that can be read")
    return run, newest(run).path


@contextlib.contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """DCP wraps what failed on each rank, with tracebacks; a user wants the first failure in one line."""
    try:
        with warnings.catch_warnings():
            # One process without a group is as we want it.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, EverstepError):
            raise cause from error
        raise CheckpointError(f"{where}: rank {rank}: {type(cause).__name__}: {cause}") from error
