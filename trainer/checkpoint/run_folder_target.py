"""Target of a save to the run folder: each rank writes its file, rank 0 commits with the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from everstep.errors import CheckpointError
from everstep.run_folder import MANIFEST, RunFolder
from everstep.storage import Storage
from everstep.storage.base import is_kept
from everstep.trainer.checkpoint.manifest import TENSORS, FileRecord, Files, record_of
from everstep.trainer.checkpoint.retention import Retention
from everstep.trainer.checkpoint.signature import UNBOUND, Binding
from everstep.trainer.checkpoint.signed_head import write_head
from everstep.trainer.checkpoint.staging import StagedState

BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class RunFolderTarget:
    """One save to the run folder; a `SaveTarget`."""

    folder: RunFolder
    path: str
    """Folder of the checkpoint, within the run folder."""
    retention: Retention
    staged: StagedState
    is_main: bool
    """True on rank 0."""
    binding: Binding = UNBOUND
    """Run and config that the signed head is bound to."""
    read_back: Callable[[], None] | None = None
    """Self-test of a run's first checkpoint, which reads it back; None for later ones."""

    def write(self) -> Files:
        """Write this rank's file.

        Raises:
            SupersededError: on rank 0, when a newer attempt owns the run.
        """
        layout = self.staged.layout
        if self.is_main:
            self.folder.check_newest(self.staged.manifest.attempt)
        if not layout.pieces:
            return {}
        return {layout.file: write_file(self.folder.storage, f"{self.path}/{layout.file}", self.staged.data())}

    def commit(self, files: Files) -> str:
        """Write the tensor index and, last, the manifest; then remove checkpoints that are no longer kept.

        Raises:
            SupersededError: a newer attempt owns the run.
            CheckpointError: the store has not kept what was written.
        """
        manifest, index = self.staged.manifest, self.staged.layout.table
        self.folder.storage.write(f"{self.path}/{TENSORS}", index)
        files[TENSORS] = record_of(index)
        self._check_sizes(files)
        self.folder.check_newest(manifest.attempt)
        manifest.files.update(files)
        self._create_manifest(manifest.to_json())
        # Before retention: the head names a checkpoint that is there at any time.
        write_head(self.folder, self.binding, manifest.step, manifest.attempt)
        self.retention.committed(self.path, manifest)
        return ""

    def seal(self, payload: str) -> None:
        """Do nothing: the manifest that rank 0 has written is the whole commit."""

    def after(self) -> None:
        if self.read_back is not None:
            self.read_back()

    def _check_sizes(self, files: Files) -> None:
        for name, record in files.items():
            path = f"{self.path}/{name}"
            size = self.folder.storage.size(path)
            if size != record.bytes:
                raise CheckpointError(f"{self.folder.url}/{path} has {size} bytes, {record.bytes} were written")

    def _create_manifest(self, data: bytes) -> None:
        path = f"{self.path}/{MANIFEST}"
        if not self.folder.storage.create(path, data):
            raise CheckpointError(f"{self.folder.url}/{self.path} was committed by another process")
        # A store may confirm a write and keep nothing; without this check retention would then remove good checkpoints.
        if not is_kept(self.folder.storage, path, data):
            raise CheckpointError(f"{self.folder.url}/{path} is not what was written: the store kept nothing")


def write_file(storage: Storage, path: str, data: memoryview) -> FileRecord:
    """Stream bytes into a file and return its record, digested on the way."""
    digest = blake3()
    with storage.writer(path) as file:
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            file.write(block)
            digest.update(block)
    return FileRecord(len(data), digest.hexdigest())
