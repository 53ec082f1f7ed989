"""Save and restore the state of a run: rank 0 decides, all ranks move bytes, the manifest commits.

A save, one at a time:

1. `Checkpointer.save` copies the state into a buffer; training pauses only for this.
2. The thread of a `PendingSave` writes this rank's file to a `SaveTarget` (run folder or node tier) and reports to
   rank 0. Rank 0 commits, manifest last, and announces the result, so that it is the same on all ranks.
3. `poll`, in a later step, or `finish`, where the result is needed at once, appends it to `finished_saves`.

A save that has failed, on whatever rank and for whatever reason:

1. The failed rank reports its error in place of its files; a rank that has not reported within `checkpoint.timeout_s`
   counts as failed. Rank 0 announces the first error, and no manifest is written.
2. `poll` returns True once the retry is due: RETRY_S after the failure, twice as long with each further one, or at once
   if a newer attempt owns the run. Ranks notice at different times, so `Stepper` sums this flag over all ranks,
   along with the loss, and all see `StepInfo.save_failed` after the same step.
3. `train` in loop.py then saves again, the state as it is by then; `save` first calls `finish`, which raises on all
   ranks SupersededError, or CheckpointError after `checkpoint.max_failures` failures in a row.
4. The last save of a run has no later step: the loop waits for it in `finish`, and retries after `retry_s`.

A failed save to the node tier is only recorded: the next one comes soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from everstep.config import Busy, CheckpointConfig
from everstep.errors import CheckpointError, SupersededError
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.layout import Layout, Staging, key_of, lay_out
from everstep.trainer.checkpoint.manifest import Manifest, ManifestFacts
from everstep.trainer.checkpoint.node_tier import NodeTier
from everstep.trainer.checkpoint.node_tier_target import NodeTierTarget
from everstep.trainer.checkpoint.pending_save import PendingSave, SaveCoordinator, SaveRecord, SaveTarget
from everstep.trainer.checkpoint.restore import Restored, Restorer
from everstep.trainer.checkpoint.retention import Retention
from everstep.trainer.checkpoint.run_folder_target import RunFolderTarget
from everstep.trainer.checkpoint.self_test import FirstCheckpoint, SelfTest
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Packed, TrainState

FIRST_POLL_S, LONGEST_POLL_S = 0.001, 0.25
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
        config: CheckpointConfig,
        facts: ManifestFacts,
        folder: RunFolder,
        mesh: Mesh,
        state: TrainState,
        *,
        maximise: bool = False,
        self_test: Callable[[], SelfTest] | None = None,
    ) -> None:
        """Prepare the saves of one attempt.

        Args:
            maximise: True if a higher held-out metric is better, for `keep_best`.
            self_test: makes the second copy that the first checkpoint is restored into; None skips this test.
        """
        self.config = config
        self.facts = facts
        self.folder = folder
        self.mesh = mesh
        self.state = state
        self.retention = Retention(folder, facts.attempt, config, maximise)
        self.saved_step = -1
        """Step of the newest checkpoint that this attempt has restored, written or is writing."""
        self.finished_saves: list[SaveRecord] = []
        """Saves that have ended; the training loop passes them to the journal."""
        self._tier = NodeTier(config.local, folder.url, mesh) if config.local.every is not None else None
        self._restorer = Restorer(folder, facts.attempt, mesh, state, facts.data_digest, self._tier)
        self._layout: Layout | None = None
        self._staging = Staging(mesh.device)
        self._coordinator = SaveCoordinator(mesh.store, mesh.rank, mesh.world)
        self._pending: PendingSave | None = None
        self._saves = 0
        self._first = FirstCheckpoint(self_test)
        self._node_step = -1
        """Step of the newest save to the node tier."""
        self._last_save_ok = True
        self._failures = 0
        """Failed saves to the run folder in a row."""
        self._save_s = 0.0
        """Duration of the last save to the run folder, from its start until it was durable."""
        self._retry_at: float | None = None

    def due(self, step: int) -> bool:
        return step > 0 and step % self.config.every == 0 and step != self.saved_step

    def due_on_nodes(self, step: int) -> bool:
        """True if the node tier needs a save at this step; False if the run folder already has it."""
        return self._tier is not None and self._tier.due(step) and step not in (self.saved_step, self._node_step)

    def preallocate(self) -> bool:
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
        if not last and self.config.busy is Busy.skip and self.mesh.decide(self._is_busy):
            return False
        self.finish()
        step, packed = self.state.progress.step, self._packed(last)
        layout = self._planned(packed.tensors)
        self._staging.fill(layout, packed.tensors)
        record = SaveRecord(step, layout.bytes, time.perf_counter() - start, local)
        target = self._target(layout, self._manifest(packed.values), local)
        self._pending = PendingSave(record, target, self._coordinator, self.config.timeout_s)
        if local:
            self._node_step = step
        else:
            self.saved_step = step
        return True

    def finish(self) -> bool:
        """Wait for the pending save, if there is one; True if the newest save succeeded.

        Raises:
            SupersededError: a newer attempt owns the run.
            CheckpointError: `checkpoint.max_failures` saves in a row have failed.
        """
        pause_s = FIRST_POLL_S
        # One collective per check: it fails at once when a rank has died, where a plain wait would never end.
        while not self.mesh.all(self._pending is None or self._pending.wait(pause_s)):
            pause_s = min(2 * pause_s, LONGEST_POLL_S)
        if self._pending is not None:
            self._finish_save(self._pending)
        self._first.check()
        return self._last_save_ok

    def poll(self) -> bool:
        """Check the pending save without waiting; True if it has failed and its retry is due."""
        if self._pending is None or not self._pending.has_ended:
            return False
        self._first.check()
        error = self._pending.error()
        if self._pending.record.local or error is None:
            self._finish_save(self._pending)
            return False
        if self._retry_at is None:
            self._retry_at = time.monotonic() + RETRY_S * 2**self._failures
        return isinstance(error, SupersededError) or time.monotonic() >= self._retry_at

    @property
    def retry_s(self) -> float:
        """Seconds to wait after the last failure."""
        return float(RETRY_S * 2 ** (self._failures - 1))

    def time_to_save(self, left_s: float | None) -> tuple[float | None, float]:
        """Return the fewest seconds left on any rank, and the seconds that a save to the run folder takes."""
        known = [left for left in self.mesh.gather(left_s) if left is not None]
        needed_s = self.mesh.decide(lambda: self._save_s * MARGIN)
        return min(known, default=None), needed_s

    @property
    def has_node_tier(self) -> bool:
        return self._tier is not None

    def close(self) -> None:
        """Delete the node tier's checkpoints: the run is complete and needs them no more."""
        if self._tier is not None:
            self._tier.keep_newest(0)

    def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the pending save before the process ends; its result is ignored."""
        if self._pending is not None:
            self._pending.wait(timeout_s)

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

    def _is_busy(self) -> bool:
        return self._pending is not None and not self._pending.has_ended

    def _finish_save(self, ended: PendingSave) -> None:
        """Take account of a save that has ended; raise if it has failed for good."""
        record, error = ended.record, ended.error()
        self._pending, self._retry_at, self._last_save_ok = None, None, error is None
        self.finished_saves.append(record)
        if record.local:
            return
        if error is None:
            self._failures, self._save_s = 0, record.seconds
            return
        self._failures += 1
        self.saved_step = -1
        if isinstance(error, SupersededError):
            error.told = not self.mesh.is_main
            raise error
        if self._failures >= self.config.max_failures:
            last = CheckpointError(
                f"{self._failures} saves in a row have failed, the last one: {error}; "
                f"checkpoint.max_failures={self.config.max_failures}"
            )
            last.told, last.passing = not self.mesh.is_main, True
            raise last

    def _packed(self, last: bool) -> Packed:
        """Return the packed state to save, after checking that the ranks agree on it."""
        if self.state.buffers is not None:
            self.state.buffers.before_save()
        if self.config.self_test and (last or self._saves % COMPARE_EVERY == 0):
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

    def _target(self, layout: Layout, manifest: Manifest, local: bool) -> SaveTarget:
        if self._tier is not None and local:
            return NodeTierTarget(self.folder, self._tier, layout, self._staging, manifest)
        path = self.folder.checkpoint(manifest.step, manifest.attempt)
        read_back = self._first.of(self.folder.storage, path, self.mesh.rank)
        is_main = self.mesh.is_main
        return RunFolderTarget(self.folder, self.retention, layout, self._staging, manifest, is_main, read_back)

    def _manifest(self, values: dict[str, Any]) -> Manifest:
        progress = self.state.progress
        return Manifest(
            step=progress.step,
            attempt=self.facts.attempt,
            samples=progress.samples(self.facts.global_batch),
            world=self.mesh.world,
            parallel=self.facts.parallel,
            time=time.time(),
            config_digest=self.facts.config_digest,
            data_digest=self.facts.data_digest,
            progress=self.state.numbers(),
            values=values,
            metric=progress.metric if progress.evaluated == progress.step else None,
        )
