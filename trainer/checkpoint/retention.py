"""Retention: the checkpoints that an attempt keeps, decided at every save from those it has recorded."""

from __future__ import annotations

from collections.abc import Iterable

from everstep.config import CheckpointConfig
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import (
    CheckpointRef,
    Manifest,
    folders,
    read_candidate,
    read_manifest,
    to_keep,
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
        self._known: dict[str, Manifest | None] = {}
        """By path; None for a folder that retention ignores (set aside, damaged, or not in the run's line)."""

    def found(self, candidates: Iterable[CheckpointRef]) -> None:
        """Record the checkpoints that existed when the attempt restored."""
        self._known.update((candidate.path, candidate.manifest) for candidate in candidates)

    def committed(self, path: str, manifest: Manifest) -> None:
        """Record a new checkpoint, then remove those no longer kept and the leftovers of older attempts."""
        self._known[path] = manifest
        there = folders(self.folder)
        self._look([each for each in there if each[1] < self.attempt and each[2] not in self._known])
        # A checkpoint that a user has removed by hand must not count as one of those kept.
        paths = {each[2] for each in there}
        known = {path: m for path, m in self._known.items() if path in paths and m is not None}
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

    def _look(self, unknown: list[tuple[int, int, str]]) -> None:
        """Read, once, folders that did not exist at the restore or were not counted then."""
        limits = self.folder.limits() if unknown else {}
        for step, attempt, path in unknown:
            try:
                data = read_manifest(self.folder.storage, path)
            except FileNotFoundError:
                if [name for name in self.folder.storage.names(path) if name.startswith("manifest")]:
                    self._known[path] = None
                else:
                    self.folder.storage.delete(path)
                continue
            on_line = step <= limits.get(attempt, 2**62)
            self._known[path] = read_candidate(path, step, attempt, data).manifest if on_line else None

    def _remove(self, path: str) -> None:
        """Remove a checkpoint, manifest first.

        An interruption then leaves an orphan, not a damaged checkpoint.
        """
        self.folder.storage.delete(f"{path}/{MANIFEST}")
        self.folder.storage.delete(path)
        del self._known[path]
