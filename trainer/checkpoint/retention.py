"""Retention: the checkpoints that an attempt keeps, decided at every save from those it has recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable

from everstep.config import CheckpointConfig
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import (
    CheckpointRef,
    Committed,
    Manifest,
    folders,
    parse_checkpoint,
    read_manifest,
    signed_run,
)


class Retention:
    """Checkpoints of a run as one attempt has recorded them.

    Only this attempt commits to the run while it owns it, so a manifest that was read once need not be read again.
    """

    def __init__(self, folder: RunFolder, attempt: int, config: CheckpointConfig, maximise: bool) -> None:
        self.folder = folder
        self.attempt = attempt
        self.config = config
        self.maximise = maximise
        self._known: dict[str, Manifest] = {}
        """By path."""
        self._ignored: set[str] = set()
        """Paths of folders that are left as they are: set aside, damaged, or not in the run's line."""

    def found(self, checkpoints: Iterable[CheckpointRef]) -> None:
        """Record the checkpoints that existed when the attempt restored."""
        for found in checkpoints:
            if isinstance(found, Committed):
                self._known[found.path] = found.manifest
            else:
                self._ignored.add(found.path)

    def committed(self, path: str, manifest: Manifest) -> None:
        """Record a new checkpoint, then remove those no longer kept and the leftovers of older attempts."""
        self._known[path] = manifest
        there = folders(self.folder)
        seen = self._known.keys() | self._ignored
        self._read([each for each in there if each[1] < self.attempt and each[2] not in seen])
        # A checkpoint that a user has removed by hand must not count as one of those kept.
        paths = {each[2] for each in there}
        known = {path: m for path, m in self._known.items() if path in paths}
        keep = to_keep(
            list(known.values()),
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            keep_every=self.config.keep_every,
            maximise=self.maximise,
        )
        # After a rollback past a damaged checkpoint, this is the newest that verifies, though not the highest step.
        keep.add((manifest.step, manifest.attempt))
        for path, old in known.items():
            if (old.step, old.attempt) not in keep:
                self._remove(path)

    def _read(self, unknown: list[tuple[int, int, str]]) -> None:
        """Read, once, folders that did not exist at the restore or were not counted then."""
        if not unknown:
            return
        lineage = self.folder.lineage()
        for step, attempt, path in unknown:
            try:
                data = read_manifest(self.folder.storage, path)
            except FileNotFoundError:
                if [name for name in self.folder.storage.names(path) if name.startswith("manifest")]:
                    self._ignored.add(path)
                else:
                    self.folder.storage.delete(path)
                continue
            if lineage.counts(step, attempt):
                self.found([parse_checkpoint(path, step, attempt, data, signed_run(self.folder))])
            else:
                self._ignored.add(path)

    def _remove(self, path: str) -> None:
        """Remove a checkpoint, manifest first.

        An interruption then leaves an orphan, not a damaged checkpoint.
        """
        self.folder.storage.delete(f"{path}/{MANIFEST}")
        self.folder.storage.delete(path)
        del self._known[path]


def to_keep(
    manifests: list[Manifest], *, keep_last: int, keep_best: int, keep_every: int | None, maximise: bool
) -> set[tuple[int, int]]:
    """Return (step, attempt) of the checkpoints to keep: the newest, the best, and the multiples."""
    by_step = sorted(manifests, key=lambda m: (m.step, m.attempt), reverse=True)
    measured = [m for m in by_step if m.metric is not None and not math.isnan(m.metric)]
    best = sorted(measured, key=lambda m: (m.metric or 0.0) * (-1 if maximise else 1))
    kept = [*by_step[:keep_last], *best[:keep_best]]
    if keep_every is not None:
        kept += [m for m in by_step if m.step % keep_every == 0]
    return {(m.step, m.attempt) for m in kept}
