"""Save and restore the state of a run: rank 0 decides, all ranks move bytes, the manifest commits.

A save, one at a time:

1. `Checkpointer.save` copies the state into a buffer; training pauses only for this.
2. The thread of a `PendingSave` writes this rank's file to a `SaveTarget` (run folder or node tier) and reports to
   rank 0. Rank 0 commits, manifest last, and announces the result, so that it is the same on all ranks.
3. `poll`, in a later step, or `finish`, where the result is needed at once, appends it to `finished_saves`.

A save that has failed, on whatever rank and for whatever reason:

1. The failed rank reports its error in place of its files; a rank that has not reported within `checkpoint.timeout_s`
   counts as failed. Rank 0 then does not commit, and announces the error; also that of a commit which fails.
2. `poll` returns True once the retry is due: RETRY_S after the failure, twice as long with each further one, or at once
   if a newer attempt owns the run. Ranks notice at different times, so `Stepper` sums this flag over all ranks,
   along with the loss, and all see `StepInfo.save_failed` after the same step.
3. `train` in loop.py then saves the state of that step. `save` first calls `finish`, which raises on all ranks:
   SupersededError, or CheckpointError after `checkpoint.max_failures` failures in a row.
4. The last save of a run has no later step: the loop waits for it in `finish`, and retries after `retry_s`.

A failed save to the node tier is only recorded: the next one comes soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from everstep.config import Busy, CheckpointConfig
from everstep.errors import CheckpointError, SupersededError
from everstep.run_folder import RunFolder
from everstep.run_id import ensure_run_id
from everstep.security.signing import is_on
from everstep.trainer.checkpoint.manifest import ManifestFacts
from everstep.trainer.checkpoint.node_copies import NodeCopies, open_tier
from everstep.trainer.checkpoint.node_tier_target import NodeTierTarget
from everstep.trainer.checkpoint.pending_save import PendingSave, SaveCoordinator, SaveRecord, SaveTarget
from everstep.trainer.checkpoint.restore import Restored, Restorer
from everstep.trainer.checkpoint.retention import Retention
from everstep.trainer.checkpoint.run_folder_target import RunFolderTarget
from everstep.trainer.checkpoint.self_test import FirstCheckpoint, SelfTest
from everstep.trainer.checkpoint.staging import StagedState, StateStager
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import TrainState

FIRST_POLL_S, LONGEST_POLL_S = 0.001, 0.25
"""Seconds between two checks of a pending save that is waited for."""
MARGIN = 1.25
"""Factor on the time of the last save when there is a deadline."""
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
        if is_on():
            facts = replace(facts, binding=replace(facts.binding, run=mesh.decide(lambda: ensure_run_id(folder))))
        self.config = config
        self._binding = facts.binding
        self.attempt = facts.attempt
        self.folder = folder
        self.mesh = mesh
        self.state = state
        self.retention = Retention(folder, facts.attempt, config, maximise)
        self.saved_step = -1
        """Step of the newest checkpoint that this attempt has restored, written or is writing."""
        self.finished_saves: list[SaveRecord] = []
        """Saves that have ended; the training loop passes them to the journal."""
        self._tier = open_tier(config, folder, mesh)
        self._copies = NodeCopies(self._tier, config.every) if self._tier and config.local.is_automatic else None
        self._restorer = Restorer(folder, facts, mesh, state, self._tier)
        self._stager = StateStager(state, mesh, facts, config.self_test)
        self._coordinator = SaveCoordinator(mesh.store, mesh.rank, mesh.world)
        self._pending: PendingSave | None = None
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
        due = self._copies.schedule.due(step) if self._copies else self._tier is not None and self._tier.due(step)
        return due and step not in (self.saved_step, self._node_step)

    def preallocate(self) -> bool:
        """Prepare the first save, before it is due; True the first time."""
        return self._stager.preallocate()

    def save(self, local: bool = False, last: bool = False) -> bool:
        """Start to save the current state; False if a pending save made it skip.

        Args:
            local: save to the node tier, not to the run folder.
            last: the run ends with this save, so it is never skipped.
        """
        if local and not last and self._copies is not None:
            self._copy(self._copies)
            return True
        # Ranks learn of a commit at different times, so rank 0 decides even where this rank has no pending save.
        if not last and self.config.busy is Busy.skip and self.mesh.decide(self._is_busy):
            return False
        self._start(local, last)
        if self._copies is not None:
            self._copies.schedule.saved(self.state.progress.step)
        return True

    def _start(self, local: bool, last: bool, automatic: bool = False) -> None:
        start = time.perf_counter()
        if self._copies is not None:
            self._copies.skip_step()
        self.finish()
        staged, step = self._stager.stage(last, prepare=not automatic), self.state.progress.step
        record = SaveRecord(step, staged.layout.bytes, time.perf_counter() - start, local, automatic)
        self._pending = PendingSave(record, self._target(staged, local), self._coordinator, self.config.timeout_s)
        if local:
            self._node_step = step
        else:
            self.saved_step = step

    def _copy(self, copies: NodeCopies) -> None:
        """Start an automatic copy if nothing is in its way, and plan the next.

        It leaves the state as it is, since the time decides on which steps copies are made.
        """
        buffers = self.state.buffers
        if copies.may_copy(self._is_blocked(), self._stager.sizes) and (buffers is None or buffers.is_even()):
            self._start(local=True, last=False, automatic=True)
        copies.skip_step()
        copies.plan(self.state.progress.step)

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
            self.mesh.activity.tick()
        if self._pending is not None:
            self._finish_save(self._pending)
        self._first.check()
        return self._last_save_ok

    def poll(self) -> bool:
        """Check the pending save without waiting; True if it has failed and its retry is due."""
        if self._copies is not None:
            pending = self._pending
            self._copies.polled(pending.record if pending is not None else None)
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
        """True if the last save may go to the node tier: not if that may end with the job, as memory does."""
        return self._tier is not None and self._copies is None

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

    def _is_blocked(self) -> bool:
        """True while a save goes on, or waits for its retry: a copy takes neither its place nor its time."""
        pending = self._pending
        return pending is not None and not (pending.has_ended and (pending.record.local or pending.error() is None))

    def _finish_save(self, ended: PendingSave) -> None:
        """Take account of a save that has ended; raise if it has failed for good."""
        record, error = ended.record, ended.error()
        self._pending, self._retry_at, self._last_save_ok = None, None, error is None
        self.finished_saves.append(record)
        if record.local:
            if self._copies is not None:
                self._copies.schedule.copied(record.stall_s)
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

    def _target(self, staged: StagedState, local: bool) -> SaveTarget:
        path = self.folder.checkpoint(staged.manifest.step, staged.manifest.attempt)
        if self._tier is not None and local:
            return NodeTierTarget(self._tier, path.rsplit("/", 1)[-1], staged)
        read_back = self._first.of(self.folder.storage, path, self.mesh.rank)
        return RunFolderTarget(self.folder, path, self.retention, staged, self.mesh.is_main, self._binding, read_back)
