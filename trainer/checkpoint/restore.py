"""Restore: find the newest checkpoint whose files all verify, and load it into the state."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from blake3 import blake3
from torch import Tensor

from everstep.errors import CheckpointError, DataError
from everstep.run_folder import CHECKPOINTS, MANIFEST, PROGRESS, RunFolder
from everstep.storage import Storage
from everstep.storage.names import leads_out
from everstep.trainer.checkpoint.manifest import (
    TENSORS,
    CheckpointRef,
    Committed,
    Damaged,
    FileRecord,
    Manifest,
    candidates,
    check_format,
    find_fault,
    set_aside,
    was_set_aside,
)
from everstep.trainer.checkpoint.node_tier import NodeCheckpoint, NodeTier, copy_to_nodes, find_on_nodes
from everstep.trainer.checkpoint.read import DamagedError, OpenCheckpoint, files_needed, fill
from everstep.trainer.checkpoint.signature import KEY, Binding, binding_fault
from everstep.trainer.checkpoint.signed_head import head_fault
from everstep.trainer.checkpoint.tensor_index import parse_metadata
from everstep.trainer.checkpoint.tensor_table import MOST_BYTES
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


def open_checkpoint(storage: Storage, found: CheckpointRef, mesh: Mesh) -> OpenCheckpoint:
    """Open a checkpoint on all ranks; rank 0 reads and verifies the tensor index for all.

    Existence and size of every file are checked too; file contents are verified as they are read.

    Raises:
        DamagedError: the manifest or a file is missing or damaged.
    """
    if isinstance(found, Damaged):
        raise DamagedError(found.why)

    def check() -> str:
        for name, record in sorted(found.manifest.files.items()):
            _check_size(storage, found.path, name, record.bytes)
        return _read_index(storage, found.path, found.manifest).decode("latin-1")  # which holds any bytes

    return _opened(storage, found.path, mesh.decide(check).encode("latin-1"), found.manifest)


def _opened(storage: Storage, path: str, table: bytes, manifest: Manifest) -> OpenCheckpoint:
    try:
        return OpenCheckpoint(storage, path, parse_metadata(storage, path, table, manifest.files), manifest)
    except CheckpointError as error:
        raise DamagedError(str(error)) from error


def _read_index(storage: Storage, path: str, manifest: Manifest) -> bytes:
    if (size := manifest.files[TENSORS].bytes) > MOST_BYTES:
        raise DamagedError(f"{TENSORS} has {size} bytes (limit {MOST_BYTES})")
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


def load_state(state: TrainState, source: OpenCheckpoint, data_digest: str, mesh: Mesh) -> None:
    """Fill the state from a checkpoint.

    Raises:
        DamagedError: on all ranks, when a file is damaged; the state is then invalid.
    """
    where, manifest = f"{source.storage.url}/{source.path}", source.manifest
    if manifest.data_digest != data_digest:
        raise DataError(
            f"{where} was trained on another dataset (digest {manifest.data_digest[:12]}, "
            f"now {data_digest[:12]}); put the old one back, or start a new run"
        )
    try:
        progress = Progress(**manifest.progress)
    except TypeError as error:
        raise CheckpointError(f"{where}: progress is not this version's: {error}") from error
    tensors = _prepared(state, source)
    mesh.together(functools.partial(fill, tensors, source, mesh.rank))
    mesh.together(lambda: _load(state, source))
    state.progress = progress


def _prepared(state: TrainState, source: OpenCheckpoint) -> dict[str, Tensor]:
    with _fitting(source):
        return state.prepare(source.metadata, source.manifest.values)


def _load(state: TrainState, source: OpenCheckpoint) -> None:
    with _fitting(source):
        state.load(source.manifest.values)


@contextlib.contextmanager
def _fitting(source: OpenCheckpoint) -> Iterator[None]:
    """Turn errors of the code that uses a manifest's `values`, whose form only it knows, into one line."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{source.storage.url}/{source.path}: values of its {MANIFEST} do not fit this run: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def pack_ref(found: CheckpointRef) -> dict[str, Any]:
    """Return a checkpoint as JSON, for the other ranks."""
    return {"committed" if isinstance(found, Committed) else "damaged": asdict(found)}


def unpack_ref(packed: dict[str, Any]) -> CheckpointRef:
    """Return a checkpoint that rank 0 has found and judged."""
    if "damaged" in packed:
        return Damaged(**packed["damaged"])
    fields = packed["committed"]["manifest"]
    files = {name: FileRecord(**record) for name, record in fields["files"].items()}
    return Committed(packed["committed"]["path"], Manifest(**{**fields, "files": files}))


class Restorer:
    """Finds and loads a checkpoint for one attempt.

    Values that a damaged checkpoint left in the state are overwritten by the next one.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        mesh: Mesh,
        state: TrainState,
        data_digest: str,
        tier: NodeTier | None,
        binding: Binding,
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.mesh = mesh
        self.state = state
        self.data_digest = data_digest
        self.tier = tier
        self.binding = binding

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
        walked = tuple(f"{each.path}: {each.why}" for each in bad)
        why = "the newest" if not bad else f"the newest that verifies; {len(bad)} damaged"
        if isinstance(loaded, NodeCheckpoint):
            why += ", from the nodes' own disks"
        why += self.mesh.decide(lambda: self._doubts(loaded))
        return Restored(loaded.step, loaded.attempt, why, walked), left

    def _doubts(self, loaded: CheckpointRef) -> str:
        """Return what the signed head and the signed config say against the choice, to append to its reason."""
        signature = loaded.manifest.signature if isinstance(loaded, Committed) else ""
        doubts = (head_fault(self.folder, self.binding), binding_fault(signature, None, self.binding.config))
        return "".join(f"; but {doubt}" for doubt in doubts if doubt)

    def reload(self) -> CheckpointRef:
        """Load the newest checkpoint that verifies, during a run; return it."""
        loaded, _, bad = self.load_newest()
        if loaded is None:
            faults = "; ".join(f"{each.path}: {each.why}" for each in bad) or "none was written"
            raise CheckpointError(f"{self.folder.url} has no checkpoint that can be read ({faults})")
        self.mesh.decide(lambda: self._set_aside(bad))
        return loaded

    def load_newest(self) -> tuple[CheckpointRef | None, list[CheckpointRef], list[Damaged]]:
        """Return (the loaded one, the run folder's remaining ones, the skipped ones with the reason)."""
        sent = self.mesh.decide(lambda: [pack_ref(found) for found in candidates(self.folder)])
        listed = [unpack_ref(found) for found in sent]
        on_nodes = find_on_nodes(self.tier, self.folder) if self.tier is not None else []
        bad: list[Damaged] = []
        for found in _newest_first([*on_nodes, *listed]):
            try:
                self._load(found)
            except DamagedError as error:
                bad.append(Damaged(found.path, found.step, found.attempt, str(error)))
                continue
            skipped = {each.path for each in bad}
            return found, [each for each in listed if each.path not in skipped], bad
        return None, [], bad

    def _load(self, found: CheckpointRef) -> None:
        check_format(self.folder, found)
        self._check_config(found)
        if isinstance(found, NodeCheckpoint):
            source = self._open_on_nodes(found)
        else:
            source = open_checkpoint(self.folder.storage, found, self.mesh)
        load_state(self.state, source, self.data_digest, self.mesh)

    def _check_config(self, found: CheckpointRef) -> None:
        """Raise CheckpointError if the config is not the signed one; resume.allow turns this into a doubt."""
        if isinstance(found, Committed) and not self.binding.may_differ:
            fault = binding_fault(found.manifest.signature, None, self.binding.config)
            if fault:
                raise CheckpointError(
                    f"{self.folder.url}/{found.path}: {fault}; put the old config.yaml back, or unset {KEY} to trust it"
                )

    def _open_on_nodes(self, found: NodeCheckpoint) -> OpenCheckpoint:
        """Open a checkpoint of the node tier, after copying the files that this rank needs to its node."""
        storage, path, manifest = found.tier.storage, found.path, found.manifest
        copy_to_nodes(found, [TENSORS])
        self.mesh.together(lambda: _read_index(storage, path, manifest))
        source = _opened(storage, path, storage.read(f"{path}/{TENSORS}"), manifest)
        copy_to_nodes(found, files_needed(_prepared(self.state, source), source))
        return source

    def _accept(self, loaded: CheckpointRef, bad: list[Damaged]) -> None:
        self._set_aside(bad)
        self.folder.record_restored(self.attempt, loaded.step, loaded.attempt)

    def _set_aside(self, bad: list[Damaged]) -> None:
        for damaged in bad:
            if damaged.path.startswith(CHECKPOINTS):  # the node tier removes its own
                set_aside(self.folder, damaged.path)

    def _check_new(self, bad: list[Damaged]) -> None:
        """Check that a run without a good checkpoint never had one, before it starts from new weights."""
        found = [f"{each.path}: {each.why}" for each in bad]
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


def _newest_first(found: list[CheckpointRef]) -> list[CheckpointRef]:
    """Sort newest first; for the same step, the node tier's comes first, since it is nearer."""
    return sorted(found, key=lambda each: (each.step, each.attempt, isinstance(each, NodeCheckpoint)), reverse=True)


def choose(url: str) -> Iterator[tuple[RunFolder, CheckpointRef]]:
    """Yield the checkpoint that a URL names, or those of the run that it names, newest first."""
    head, name = split_url(url)
    run = RunFolder(head)
    is_found = False
    for found in candidates(run):
        if not name or found.path.endswith(f"/{name}"):
            check_format(run, found)
            is_found = True
            yield run, found
    if name and not is_found:
        raise CheckpointError(f"{url} is not a checkpoint: it has no manifest that can be read")


def locate(url: str) -> tuple[RunFolder, str]:
    """Return (run folder, path in it) of a verified checkpoint: the one of the URL, or the run's newest."""
    faults = []
    for run, found in choose(url):
        if isinstance(found, Damaged):
            fault = found.why
        else:
            fault = find_fault(run.storage, found.path, found.manifest.files.items())
        if not fault:
            return run, found.path
        faults.append(f"{found.path}: {fault}")
    raise CheckpointError(f"{url} has no checkpoint that can be read ({'; '.join(faults) or 'none was written'})")
