"""Code of a sweep: a snapshot taken when the sweep begins, and used by all trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everstep.launch.submit.snapshot import archive, open_code, take
from everstep.launch.sweep.sweep_folder import SweepFolder
from everstep.run_folder import RunFolder

KEPT = "code.json"


@dataclass(frozen=True)
class Code:
    """A code snapshot in the sweep's own folder."""

    folder: RunFolder
    place: str
    """Same format as `Snapshot.place`."""

    def give(self, trial: RunFolder) -> None:
        """Copy the snapshot into a trial's folder, so that the folder is self-contained."""
        file = archive(self.place.partition("/")[0])
        if not trial.storage.exists(file):
            trial.storage.create(file, self.folder.storage.read(file))

    def open(self) -> Path:
        """Unpack the snapshot on this machine and return its path."""
        return open_code(self.folder, self.place)


def keep(sweep: SweepFolder, plugins: Sequence[str], limit_mb: int) -> Code | None:
    """Return the sweep's code snapshot, taken by its first driver; None when no code was found.

    Later changes of the checkout have no effect.
    """
    folder = RunFolder(sweep.url)
    if not sweep.storage.exists(KEPT):
        found = take(folder, Path.cwd(), plugins, limit_mb=limit_mb)
        place = found.place if found.files else None
        sweep.storage.create(KEPT, (json.dumps({"place": place}) + "\n").encode())
    place = json.loads(sweep.storage.read(KEPT))["place"]
    return None if place is None else Code(folder, place)
