"""Load: open a checkpoint on all ranks, verify its files, and fill the state from it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from blake3 import blake3
from torch import Tensor

from everstep.errors import CheckpointError, DataError
from everstep.run_folder import MANIFEST
from everstep.storage import Storage, read_limited
from everstep.storage.names import leads_out
from everstep.trainer.checkpoint.manifest import TENSORS, CheckpointRef, Committed, Damaged, FileRecord, Manifest
from everstep.trainer.checkpoint.read import DamagedError, OpenCheckpoint, fill
from everstep.trainer.checkpoint.tensor_index import parse_metadata
from everstep.trainer.checkpoint.tensor_table import MOST_BYTES
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Progress, TrainState


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
        return read_table(storage, found.path, found.manifest).decode("latin-1")  # which holds any bytes

    return open_with_table(storage, found.path, mesh.decide(check).encode("latin-1"), found.manifest)


def open_with_table(storage: Storage, path: str, table: bytes, manifest: Manifest) -> OpenCheckpoint:
    try:
        return OpenCheckpoint(storage, path, parse_metadata(storage, path, table, manifest.files), manifest)
    except CheckpointError as error:
        raise DamagedError(str(error)) from error


def read_table(storage: Storage, path: str, manifest: Manifest) -> bytes:
    if (size := manifest.files[TENSORS].bytes) > MOST_BYTES:
        raise DamagedError(f"{TENSORS} has {size} bytes (limit {MOST_BYTES})")
    try:
        table = read_limited(storage, f"{path}/{TENSORS}", size)
    except ValueError as error:
        raise DamagedError(str(error)) from error
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
    tensors = allocate(state, source)
    mesh.together(functools.partial(fill, tensors, source, mesh.rank))
    mesh.together(lambda: _load(state, source))
    state.progress = progress


def allocate(state: TrainState, source: OpenCheckpoint) -> dict[str, Tensor]:
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
