"""Which checkpoints an attempt keeps: decided at every save from what it remembers, not by reading them all again."""

from __future__ import annotations

from collections.abc import Iterable

from everstep.config import CheckpointConfig
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import Candidate, Manifest, folders, read_candidate, read_manifest, to_keep


class Retention:
    """What one attempt knows of its run's checkpoints.

    Nobody else commits to the run while the attempt owns it, so a manifest that was read once need not be read again.
    """

    def __init__(self, folder: RunFolder, attempt: int, config: CheckpointConfig, maximise: bool) -> None:
        self.folder = folder
        self.attempt = attempt
        self.config = config
        self.maximise = maximise
        self._known: dict[str, Manifest | None] = {}
        """By path; None for a folder that is none of retention's business (set aside, damaged, off the line)."""

    def found(self, candidates: Iterable[Candidate]) -> None:
        """Remember what was there when the attempt restored."""
        self._known.update((candidate.path, candidate.manifest) for candidate in candidates)

    def committed(self, path: str, manifest: Manifest) -> None:
        """Remember a new checkpoint, then remove those that are kept no longer and what older attempts left."""
        self._known[path] = manifest
        there = folders(self.folder)
        self._look([each for each in there if each[1] < self.attempt and each[2] not in self._known])
        # What somebody has removed by hand may not count as one of those that are kept.
        paths = {each[2] for each in there}
        known = {path: m for path, m in self._known.items() if path in paths and m is not None}
        keep = to_keep(
            list(known.values()),
            keep_last=self.config.keep_last,
            keep_best=self.config.keep_best,
            keep_every=self.config.keep_every,
            maximise=self.maximise,
        )
        # After a rollback past a damaged one, this is the newest that verifies, though its step is not the highest.
        keep.add((manifest.step, manifest.attempt))
        for path, old in known.items():
            if (old.step, old.attempt) not in keep:
                self._remove(path)

    def _look(self, unknown: list[tuple[int, int, str]]) -> None:
        """Learn of folders that were not there at the restore, or did not count: once, then they are known."""
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
        """Manifest first: whatever interrupts this leaves an orphan, never half a checkpoint."""
        self.folder.storage.delete(f"{path}/{MANIFEST}")
        self.folder.storage.delete(path)
        del self._known[path]
