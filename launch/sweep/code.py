"""The code of a sweep: kept once, when it begins. Every trial runs that, however late it starts."""

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
    """A snapshot in the sweep's own folder."""

    folder: RunFolder
    place: str
    """As `Snapshot.place` says it."""

    def give(self, trial: RunFolder) -> None:
        """A copy into a trial's folder, which has to be enough by itself."""
        file = archive(self.place.partition("/")[0])
        if not trial.storage.exists(file):
            trial.storage.create(file, self.folder.storage.read(file))

    def open(self) -> Path:
        """Where it lies on this machine."""
        return open_code(self.folder, self.place)


def keep(sweep: SweepFolder, plugins: Sequence[str], limit_mb: int) -> Code | None:
    """The sweep's code: that of its first driver, whatever has become of the checkout; None where there is none."""
    folder = RunFolder(sweep.url)
    if not sweep.storage.exists(KEPT):
        found = take(folder, Path.cwd(), plugins, limit_mb=limit_mb)
        place = found.place if found.files else None
        sweep.storage.create(KEPT, (json.dumps({"place": place}) + "\n").encode())
    place = json.loads(sweep.storage.read(KEPT))["place"]
    return None if place is None else Code(folder, place)
