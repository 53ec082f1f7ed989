"""Restore: find the newest checkpoint whose files all verify, and load it into the state."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from everstep.errors import CheckpointError, DataError
from everstep.run_folder import CHECKPOINTS, PROGRESS, RunFolder
from everstep.storage import Storage
from everstep.trainer.checkpoint.manifest import (
    TENSORS,
    CheckpointRef,
    Manifest,
    candidates,
    check_format,
    damage,
    leads_out,
    set_aside,
    was_set_aside,
)
from everstep.trainer.checkpoint.node_tier import LocalTier, Parts, find_parts, spread_parts
from everstep.trainer.checkpoint.read import DamagedError, OpenCheckpoint, files_needed, fill
from everstep.trainer.checkpoint.tensor_index import parse_metadata
from everstep.trainer.checkpoint.tools.inventory import split_url
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Progress, TrainState


@dataclass(frozen=True)
class Restored:
    """The checkpoint from which an attempt resumes, and the reason for the choice."""

    step: int
    attempt: int
    why: str
    walked_past: tuple[str, ...] = ()


def open_source(storage: Storage, candidate: CheckpointRef, mesh: Mesh) -> OpenCheckpoint:
    """Return the checkpoint as a source of tensors; rank 0 reads and verifies the tensor index for all.

    Existence and size of every file are checked too; file contents are verified as they are read.

    Raises:
        DamagedError: a file is missing or damaged.
    """
    manifest = candidate.manifest
    if manifest is None:
        raise DamagedError(candidate.damage)
    path = candidate.path

    def look() -> bytes:
        for name, record in sorted(manifest.files.items()):
            _check_size(storage, path, name, record.bytes)
        return _verified_table(storage, path, manifest)

    metadata = parse_metadata(storage, path, mesh.decide(look))
    return OpenCheckpoint(storage, path, metadata, manifest.files)


def _verified_table(storage: Storage, path: str, manifest: Manifest) -> bytes:
    table = storage.read(f"{path}/{TENSORS}")
    if blake3(table).hexdigest() != manifest.files[TENSORS].blake3:
        raise DamagedError(f"{TENSORS} does not match its BLAKE3")
    return table


def _check_size(storage: Storage, path: str, name: str, expected: int) -> None:
    if leads_out(storage, path, name):
        raise DamagedError(f"{name} is a link out of the checkpoint")
    try:
        size = storage.size(f"{path}/{name}")
    except FileNotFoundError as error:
        raise DamagedError(f"{name} is missing") from error
    if size != expected:
        raise DamagedError(f"{name} has {size} bytes, not {expected}")


def load_state(state: TrainState, source: OpenCheckpoint, manifest: Manifest, data_digest: str, mesh: Mesh) -> None:
    """Fill the state from a checkpoint.

    Raises:
        DamagedError: on all ranks, when a file is damaged; the state is then invalid.
    """
    where = f"{source.storage.url}/{source.path}"
    if manifest.data_digest != data_digest:
        raise DataError(
            f"{where} was trained on another dataset (digest {manifest.data_digest[:12]}, "
            f"now {data_digest[:12]}); put the old one back, or start a new run"
        )
    try:
        progress = Progress(**manifest.progress)
    except TypeError as error:
        raise CheckpointError(f"{where}: progress is not this version's: {error}") from error
    tensors = state.prepare(source.metadata, manifest.values)
    mesh.together(functools.partial(fill, tensors, source, mesh.rank))
    mesh.together(lambda: state.load(manifest.values))
    state.progress = progress


class Restorer:
    """Finds and loads a checkpoint for one attempt.

    Values that a damaged checkpoint left in the state are overwritten by the next one.
    """

    def __init__(
        self, folder: RunFolder, attempt: int, mesh: Mesh, state: TrainState, data_digest: str, tier: LocalTier | None
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.mesh = mesh
        self.state = state
        self.data_digest = data_digest
        self.tier = tier

    def restore(self) -> tuple[Restored | None, list[CheckpointRef]]:
        """Return the loaded checkpoint (None if the run has none yet) and the run folder's remaining ones.

        Damaged checkpoints are skipped and, once a good one is loaded, set aside. If none is good, nothing is changed.

        Raises:
            CheckpointError: all are damaged; the message lists the fault of each.
        """
        loaded, left, bad = self.load_newest()
        self.mesh.decide(lambda: self._accept(loaded, bad) if loaded is not None else self._check_new(bad))
        if loaded is None:
            return None, left
        walked = tuple(f"{c.path}: {why}" for c, why in bad)
        why = "the newest" if not bad else f"the newest that verifies; {len(bad)} damaged"
        if loaded not in left:
            why += ", from the nodes' own disks"
        return Restored(loaded.step, loaded.attempt, why, walked), left

    def reload(self) -> CheckpointRef:
        """Load the newest checkpoint that verifies, during a run; return it."""
        loaded, _, bad = self.load_newest()
        if loaded is None:
            faults = "; ".join(f"{c.path}: {why}" for c, why in bad) or "none was written"
            raise CheckpointError(f"{self.folder.url} has no checkpoint that can be read ({faults})")
        self.mesh.decide(lambda: self._set_aside(bad))
        return loaded

    def load_newest(self) -> tuple[CheckpointRef | None, list[CheckpointRef], list[tuple[CheckpointRef, str]]]:
        """Return (the loaded one, the run folder's remaining ones, the skipped ones with the reason)."""
        left = self.mesh.decide(lambda: list(candidates(self.folder)))
        parts = find_parts(self.tier, self.folder) if self.tier is not None else []
        known = {(p.candidate.step, p.candidate.attempt): p for p in reversed(parts)}
        bad: list[tuple[CheckpointRef, str]] = []
        for candidate in _newest_first([p.candidate for p in parts], left):
            local = known.get((candidate.step, candidate.attempt))
            try:
                self._load(candidate, local if local is not None and local.candidate is candidate else None)
            except DamagedError as error:
                bad.append((candidate, str(error)))
                continue
            return candidate, [c for c in left if all(c is not other for other, _ in bad)], bad
        return None, [], bad

    def _load(self, candidate: CheckpointRef, parts: Parts | None) -> None:
        check_format(self.folder, candidate)
        if parts is None or self.tier is None:
            source = open_source(self.folder.storage, candidate, self.mesh)
        else:
            source = self._open_parts(self.tier, parts)
        if candidate.manifest is not None:
            load_state(self.state, source, candidate.manifest, self.data_digest, self.mesh)

    def _open_parts(self, tier: LocalTier, parts: Parts) -> OpenCheckpoint:
        """Return the node tier's checkpoint, after copying the files that this rank needs to its node."""
        manifest = parts.candidate.manifest
        if manifest is None:
            raise DamagedError(parts.candidate.damage)
        spread_parts(tier, parts, [TENSORS])
        self.mesh.together(lambda: _verified_table(tier.storage, parts.candidate.path, manifest))
        table = tier.storage.read(f"{parts.candidate.path}/{TENSORS}")
        metadata = parse_metadata(tier.storage, parts.candidate.path, table)
        source = OpenCheckpoint(tier.storage, parts.candidate.path, metadata, manifest.files)
        spread_parts(tier, parts, files_needed(self.state.prepare(metadata, manifest.values), source))
        return source

    def _accept(self, loaded: CheckpointRef, bad: list[tuple[CheckpointRef, str]]) -> None:
        self._set_aside(bad)
        self.folder.record_restored(self.attempt, loaded.step, loaded.attempt)

    def _set_aside(self, bad: list[tuple[CheckpointRef, str]]) -> None:
        for damaged, _ in bad:
            if damaged.path.startswith(CHECKPOINTS):  # the node tier removes its own
                set_aside(self.folder, damaged)

    def _check_new(self, bad: list[tuple[CheckpointRef, str]]) -> None:
        """Check that a run without a good checkpoint never had one, before it starts from new weights."""
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


def _newest_first(local: list[CheckpointRef], remote: list[CheckpointRef]) -> list[CheckpointRef]:
    """Sort newest first; for the same step, the node tier's comes first, since it is nearer."""
    return sorted([*local, *remote], key=lambda c: (c.step, c.attempt, c in local), reverse=True)


def choose(url: str) -> Iterator[tuple[RunFolder, CheckpointRef]]:
    """Yield the checkpoint that a URL names, or those of the run that it names, newest first."""
    head, name = split_url(url)
    run = RunFolder(head)
    found = 0
    for candidate in candidates(run):
        if not name or candidate.path.endswith(f"/{name}"):
            check_format(run, candidate)
            found += 1
            yield run, candidate
    if name and not found:
        raise CheckpointError(f"{url} is not a checkpoint: it has no manifest that can be read")


def locate(url: str) -> tuple[RunFolder, str]:
    """Return (run folder, path in it) of a verified checkpoint: the one of the URL, or the run's newest."""
    faults = []
    for run, candidate in choose(url):
        fault = candidate.damage
        if candidate.manifest is not None:
            fault = damage(run.storage, candidate.path, candidate.manifest.files.items())
        if not fault:
            return run, candidate.path
        faults.append(f"{candidate.path}: {fault}")
    raise CheckpointError(f"{url} has no checkpoint that can be read ({'; '.join(faults) or 'none was written'})")
