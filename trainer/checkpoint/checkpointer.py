"""Save and restore the state of a run: rank 0 decides, all ranks move bytes, the manifest commits.

Training pauses only while the state is copied into a buffer. The rest of a save runs in a background thread (see
pending_save.py), one save at a time. All ranks agree on the result of each save, and a failed save is retried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from everstep.config import Busy, Goal, RunConfig
from everstep.errors import CheckpointError, SupersededError
from everstep.frozen_config import digest
from everstep.run_folder import MANIFEST, RunFolder
from everstep.storage.base import is_kept
from everstep.trainer.checkpoint.layout import Layout, Staging, key_of, lay_out
from everstep.trainer.checkpoint.manifest import TENSORS, Manifest
from everstep.trainer.checkpoint.node_tier import LocalTier, without_replicas
from everstep.trainer.checkpoint.pending_save import (
    Files,
    FinishedSave,
    PendingSave,
    Save,
    SaveCoordinator,
    record_of,
    write_file,
)
from everstep.trainer.checkpoint.restore import Restored, Restorer
from everstep.trainer.checkpoint.retention import Retention
from everstep.trainer.checkpoint.self_test import FirstCheckpoint, SelfTest
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Packed, TrainState

FIRST_LOOK_S, LONGEST_LOOK_S = 0.001, 0.25
"""Seconds between two checks of a pending save that is waited for."""
MARGIN = 1.25
"""Factor on the time of the last save when there is a deadline."""
COMPARE_EVERY = 16
"""The ranks' states are compared at the first save, every so many saves, and at the last save."""
RETRY_S = 10.0
"""Delay before a failed save is retried; it doubles with each further failure."""


class Checkpointer:
    """The checkpoints of one attempt at a run."""

    def __init__(
        self,
        run: RunConfig,
        folder: RunFolder,
        attempt: int,
        mesh: Mesh,
        state: TrainState,
        data_digest: str,
        self_test: Callable[[], SelfTest] | None = None,
    ) -> None:
        """Prepare the saves of one attempt.

        Args:
            self_test: makes the second copy that the first checkpoint is restored into; None skips this test.
        """
        self.run = run
        self.folder = folder
        self.attempt = attempt
        self.mesh = mesh
        self.state = state
        self.data_digest = data_digest
        self.retention = Retention(folder, attempt, run.checkpoint, run.evaluate.goal is Goal.max)
        self.saved_step = -1
        """Step of the newest checkpoint that this attempt has restored, written or is writing."""
        self.landed: list[FinishedSave] = []
        """Saves that have ended; the training loop passes them to the journal."""
        local = run.checkpoint.local
        self._tier = LocalTier(local, folder.url, mesh) if local.every is not None else None
        self._restorer = Restorer(folder, attempt, mesh, state, data_digest, self._tier)
        self._config_digest = digest(run)  # 20 ms, which no save has to spare
        self._layout: Layout | None = None
        self._staging = Staging(mesh.device)
        self._meeting = SaveCoordinator(mesh.store, mesh.rank, mesh.world)
        self._save: Save | None = None
        self._saves = 0
        self._first = FirstCheckpoint(self_test)
        self._local_step = -1
        self._stands = True
        self._failures = 0
        self._seconds = 0.0
        """Duration of the last save to the run folder, from its start until it was durable."""
        self._retry_at = float("inf")

    def due(self, step: int) -> bool:
        return step > 0 and step % self.run.checkpoint.every == 0 and step != self.saved_step

    def due_locally(self, step: int) -> bool:
        """True if the node tier needs a save at this step; False if the run folder already has it."""
        return self._tier is not None and self._tier.due(step) and step not in (self.saved_step, self._local_step)

    def get_ready(self) -> bool:
        """Plan the layout and allocate the buffer before the first save needs them; True the first time."""
        if self._layout is not None:
            return False
        self._layout = lay_out(self.state.pack().tensors, self.mesh)
        self._staging.make_room(self._layout.bytes)
        return True

    def save(self, local: bool = False, last: bool = False) -> bool:
        """Start to save the current state; False if a pending save made it skip.

        Args:
            local: save to the node tier, not to the run folder.
            last: the run ends with this save, so it is never skipped.
        """
        start = time.perf_counter()
        # Ranks learn of a commit at different times, so rank 0 decides even where this rank has no pending save.
        if not last and self.run.checkpoint.busy is Busy.skip and self.mesh.decide(self._is_busy):
            return False
        self.finish()
        step, packed = self.state.progress.step, self._packed(last)
        layout = self._planned(packed.tensors)
        self._staging.fill(layout, packed.tensors)
        stall_s = time.perf_counter() - start
        manifest = self._manifest(packed.values)
        flight = self._fly_local(layout, step, manifest) if local else self._fly(layout, step, manifest)
        self._save = Save(step, layout.bytes, stall_s, flight, local)
        if local:
            self._local_step = step
        else:
            self.saved_step = step
        return True

    def _fly(self, layout: Layout, step: int, manifest: Manifest) -> PendingSave:
        """Start the pending save to the run folder."""
        path = self.folder.checkpoint(step, self.attempt)
        return PendingSave(
            lambda: self._write(layout, path),
            lambda files: self._commit(layout, path, manifest, files),
            lambda _: None,
            self._meeting,
            self.run.checkpoint.timeout_s,
            self._first.of(self.folder.storage, path, self.mesh.rank),
        )

    def _fly_local(self, layout: Layout, step: int, manifest: Manifest) -> PendingSave:
        """Start the pending save to the node tier."""
        tier = self._tier
        if tier is None:
            raise RuntimeError("there is no local tier")
        path = self.folder.checkpoint(step, self.attempt).rsplit("/", 1)[-1]

        def commit(files: Files) -> str:
            manifest.files.update(without_replicas(files))
            manifest.files[TENSORS] = record_of(layout.table)
            return manifest.to_json().decode()

        return PendingSave(
            lambda: tier.write(layout, path, self._staging.bytes(layout.bytes)),
            commit,
            lambda word: tier.seal(path, word, layout.table),
            self._meeting,
            self.run.checkpoint.timeout_s,
        )

    def finish(self) -> bool:
        """Wait for the pending save, if there is one; True if the newest save succeeded.

        Raises:
            SupersededError: a newer attempt owns the run.
            CheckpointError: `checkpoint.max_failures` saves in a row have failed.
        """
        pause_s = FIRST_LOOK_S
        # One collective per check: it fails at once when a rank has died, where a plain wait would never end.
        while not self.mesh.all(self._save is None or self._save.flight.wait(pause_s)):
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        if self._save is not None:
            self._settle(self._save)
        self._first.check()
        return self._stands

    def poll(self) -> bool:
        """Check the pending save without waiting; True when all ranks should `finish` it because it failed."""
        if self._save is None or not self._save.flight.has_ended:
            return False
        self._first.check()
        if self._save.local or self._save.flight.error() is None:
            self._settle(self._save)
            return False
        if isinstance(self._save.flight.error(), SupersededError):
            return True
        if self._retry_at == float("inf"):
            self._retry_at = time.monotonic() + RETRY_S * 2**self._failures
        return time.monotonic() >= self._retry_at

    @property
    def retry_s(self) -> float:
        """Seconds to wait after the last failure."""
        return float(RETRY_S * 2 ** (self._failures - 1))

    def time_to_save(self, left_s: float | None) -> tuple[float | None, float]:
        """Return the fewest seconds left on any rank, and the seconds that a save to the run folder takes."""
        known = [left for left in self.mesh.gather(left_s) if left is not None]
        needed_s = self.mesh.decide(lambda: self._seconds * MARGIN)
        return min(known, default=None), needed_s

    @property
    def has_local_tier(self) -> bool:
        return self._tier is not None

    def close(self) -> None:
        """Delete the node tier's checkpoints: the run is complete and needs them no more."""
        if self._tier is not None:
            self._tier.keep_newest(0)

    def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the pending save before the process ends; its result is ignored."""
        if self._save is not None:
            self._save.flight.wait(timeout_s)

    def _is_busy(self) -> bool:
        return self._save is not None and not self._save.flight.has_ended

    def _settle(self, save: Save) -> None:
        error = save.flight.error()
        self._stands = error is None
        self._save, self._retry_at = None, float("inf")
        self.landed.append(
            FinishedSave(save.step, save.bytes, save.stall_s, save.flight.seconds, str(error or ""), save.local)
        )
        if save.local:  # the next node-tier save comes soon, and only failures in the run folder endanger the run
            return
        self._failures = 0 if error is None else self._failures + 1
        if error is None:
            self._seconds = save.flight.seconds
            return
        self.saved_step = -1
        if isinstance(error, SupersededError):
            error.told = not self.mesh.is_main
            raise error
        if self._failures >= self.run.checkpoint.max_failures:
            last = CheckpointError(
                f"{self._failures} saves in a row have failed, the last one: {error}; "
                f"checkpoint.max_failures={self.run.checkpoint.max_failures}"
            )
            last.told, last.passing = not self.mesh.is_main, True
            raise last

    def _packed(self, last: bool) -> Packed:
        """Return the packed state to save, after checking that the ranks agree on it."""
        if self.state.buffers is not None:
            self.state.buffers.before_save()
        if self.run.checkpoint.self_test and (last or self._saves % COMPARE_EVERY == 0):
            self.state.check_agreement(self.mesh)
        self._saves += 1
        return self.state.pack()

    def _planned(self, tensors: dict[str, Tensor]) -> Layout:
        """Return the layout; all ranks plan it again if one of them has other tensors than at the last save."""
        if not self.mesh.all(self._layout is not None and self._layout.key == key_of(tensors)):
            self._layout = None
        if self._layout is None:
            self._layout = lay_out(tensors, self.mesh)
        return self._layout

    def _write(self, layout: Layout, path: str) -> Files:
        """Write this rank's file, in the thread of the pending save."""
        if self.mesh.is_main:
            self.folder.check_newest(self.attempt)
        if not layout.pieces:
            return {}
        data = self._staging.bytes(layout.bytes)
        return {layout.file: write_file(self.folder.storage, f"{path}/{layout.file}", data)}

    def _commit(self, layout: Layout, path: str, manifest: Manifest, files: Files) -> str:
        """Commit on rank 0, in the thread of the pending save, once the files of all ranks are written."""
        storage = self.folder.storage
        storage.write(f"{path}/{TENSORS}", layout.table)
        files[TENSORS] = record_of(layout.table)
        for name, record in files.items():
            size = storage.size(f"{path}/{name}")
            if size != record.bytes:
                raise CheckpointError(f"{self.folder.url}/{path}/{name} has {size} bytes, {record.bytes} were written")
        self.folder.check_newest(self.attempt)
        manifest.files.update(files)
        if not storage.create(f"{path}/{MANIFEST}", manifest.to_json()):
            raise CheckpointError(f"{self.folder.url}/{path} was committed by another process")
        # A store may confirm a write and keep nothing; without this check retention would then remove good checkpoints.
        if not is_kept(storage, f"{path}/{MANIFEST}", manifest.to_json()):
            raise CheckpointError(
                f"{self.folder.url}/{path}/{MANIFEST} is not what was written: the store kept nothing"
            )
        self.retention.committed(path, manifest)
        return ""

    def _manifest(self, values: dict[str, Any]) -> Manifest:
        progress = self.state.progress
        return Manifest(
            step=progress.step,
            attempt=self.attempt,
            samples=progress.samples(self.run.global_batch),
            world=self.mesh.world,
            parallel=self.run.parallel.kind.value,
            time=time.time(),
            config_digest=self._config_digest,
            data_digest=self.data_digest,
            progress=self.state.numbers(),
            values=values,
            metric=progress.metric if progress.evaluated == progress.step else None,
        )

    def restore(self) -> Restored | None:
        """Load the newest checkpoint that verifies, from any tier; None when the run has none yet."""
        restored, left = self._restorer.restore()
        if restored is not None:
            self.saved_step = restored.step if any(c.step == restored.step for c in left) else -1
            self.mesh.decide(lambda: self.retention.found(left))
        return restored

    def reload(self) -> int:
        """Roll back to the newest checkpoint of this attempt's line; return its step."""
        self.finish()
        return self._restorer.reload().step
