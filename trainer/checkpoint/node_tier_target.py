"""Target of a save to the node tier: each rank's file on its own node and a replica on the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

import torch
import torch.distributed as dist
from blake3 import blake3

from everstep.errors import CheckpointError, StorageError
from everstep.run_folder import MANIFEST
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint.layout import file_of
from everstep.trainer.checkpoint.manifest import TENSORS, FileRecord, Files, record_of
from everstep.trainer.checkpoint.node_tier import BLOCK_BYTES, KEEP, NodeTier
from everstep.trainer.checkpoint.staging import StagedState

REPLICA = "replica of "
"""Prefix of a replica's name in the records that a rank reports."""


@dataclass(frozen=True)
class NodeTierTarget:
    """One save to the node tier; a `SaveTarget`."""

    tier: NodeTier
    path: str
    """Folder of the checkpoint on each node."""
    staged: StagedState

    def write(self) -> Files:
        """Write this rank's file to its node and the next one, and store replicas of other ranks.

        A rank that cannot write still sends and receives, since the other ranks wait for it.
        """
        rank, pairs, sizes = self.tier.mesh.rank, self.tier.pairs, self.staged.layout.sizes
        data = self.staged.data()
        own = [self._open(rank)] if self.staged.layout.pieces else []
        replicas = {p.sender: self._open(p.sender) for p in pairs if p.holder == rank and sizes[p.sender]}
        holders = [pair.holder for pair in pairs if pair.sender == rank]
        for start in range(0, max(sizes), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            sent = [dist.isend(_tensor(block), to, group=self.tier.group) for to in holders if len(block)]
            for file in own if len(block) else ():
                file.append(block)
            for sender, file in replicas.items():
                if sizes[sender] > start:
                    file.append(self._receive(sender, min(BLOCK_BYTES, sizes[sender] - start)))
            for work in sent:
                if work is not None:
                    work.wait()
        files = {file_of(rank): file.finish() for file in own}
        return files | {f"{REPLICA}{file_of(sender)}": file.finish() for sender, file in replicas.items()}

    def commit(self, files: Files) -> str:
        """Return the manifest, which each node then writes for itself.

        Raises:
            CheckpointError: a replica differs from its original.
        """
        manifest = self.staged.manifest
        manifest.files.update(without_replicas(files))
        manifest.files[TENSORS] = record_of(self.staged.layout.table)
        return manifest.to_json().decode()

    def seal(self, payload: str) -> None:
        """Commit on each node: index, then manifest; then remove older checkpoints."""
        if self.tier.leads:
            self.tier.storage.write(f"{self.path}/{TENSORS}", self.staged.layout.table)
            self.tier.storage.create(f"{self.path}/{MANIFEST}", payload.encode())
            self.tier.keep_newest(KEEP)

    def after(self) -> None:
        """Do nothing: only a checkpoint of the run folder is read back."""

    def _open(self, rank: int) -> DigestingFile:
        return DigestingFile(self.tier.storage, f"{self.path}/{file_of(rank)}")

    def _receive(self, sender: int, size: int) -> memoryview:
        block = torch.empty(size, dtype=torch.uint8)
        dist.recv(block, sender, group=self.tier.group)
        return memoryview(block.numpy())  # type: ignore[arg-type]


class DigestingFile:
    """A file of the node tier while it is written; an error is raised by `finish`, not before."""

    def __init__(self, storage: LocalStorage, path: str) -> None:
        self._digest = blake3()
        self._bytes = 0
        self._error: Exception | None = None
        self._open = ExitStack()
        self._file: IO[bytes] | None = None
        with self._noting():
            self._file = self._open.enter_context(storage.writer(path))

    def append(self, block: memoryview) -> None:
        if self._file is not None and self._error is None:
            with self._noting():
                self._file.write(block)
            self._digest.update(block)
            self._bytes += len(block)

    def finish(self) -> FileRecord:
        """Publish the file, or raise the error that occurred while it was written."""
        if self._error is not None:
            self._open.__exit__(type(self._error), self._error, None)
            raise self._error
        self._open.close()
        return FileRecord(self._bytes, self._digest.hexdigest())

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, StorageError) as error:
            self._error = error


def without_replicas(files: Files) -> Files:
    """Return the files without replicas.

    Raises:
        CheckpointError: a replica differs from its original.
    """
    own = {name: record for name, record in files.items() if not name.startswith(REPLICA)}
    for name, record in files.items():
        if name.startswith(REPLICA) and own.get(name.removeprefix(REPLICA)) != record:
            raise CheckpointError(f"the {name} is not what was sent")
    return own


def _tensor(block: memoryview) -> torch.Tensor:
    return torch.frombuffer(block, dtype=torch.uint8)
