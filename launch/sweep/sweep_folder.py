"""Folder of a sweep: the complete state of its driver, so another driver can continue on any machine.

SWEEP/
  sweep.yaml                swept keys and the composed configs; frozen
  records/00000001.json …   suggestions, results, promotions, prunings: create-only, in one order
  leases/0001.json …        the driver's lease
  stop                      marker: the sweep is cancelled
  batches/TOKEN.txt         run folders of the trials that were submitted together, a line each (launch/submit/array.py)
  trials/NAME/              ordinary run folders
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError, SupersededError, nearest
from everstep.launch.config import JobConfig
from everstep.launch.console import say
from everstep.launch.runs.lookup import is_run, names
from everstep.launch.submit.snapshot import archive, open_code, take
from everstep.launch.sweep.state import SweepState
from everstep.run_folder import STOP_MARKER, RunFolder
from everstep.storage import Storage, join_url, open_storage

SWEEP = "sweep.yaml"
RECORDS = "records"
TRIALS = "trials"
READERS = 16
"""Threads that read records."""


@dataclass
class SweepFolder:
    """One sweep on any storage."""

    url: str
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.storage = open_storage(self.url)

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def trials_url(self) -> str:
        return join_url(self.storage.url, TRIALS)

    def run(self, name: str) -> RunFolder:
        return RunFolder(join_url(self.trials_url, name))

    def story(self) -> SweepState:
        """Replay all records. ConfigError for a damaged one."""
        names = [name for name in self.storage.names(RECORDS) if name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            texts = pool.map(lambda name: self.storage.read(f"{RECORDS}/{name}"), names)
            try:
                return SweepState.of(json.loads(text) for text in texts)
            except (ValueError, KeyError, IndexError, AttributeError) as error:
                raise ConfigError(f"a record in {self.url}/{RECORDS} is damaged: {error!r}") from error

    def append(self, story: SweepState, record: Mapping[str, Any]) -> None:
        """Write the next record and apply it. SupersededError when another driver has written that record."""
        text = json.dumps(_without_nan(record), sort_keys=True) + "\n"
        if not self.storage.create(f"{RECORDS}/{story.length:08d}.json", text.encode()):
            raise SupersededError(f"another driver goes on with {self.url}; this one stops")
        story.apply(json.loads(text))

    def stop(self, by: str, trials: list[str]) -> None:
        """Write the stop marker, with the trials that are cancelled with the sweep."""
        self.storage.write(STOP_MARKER, (json.dumps({"by": by, "trials": trials}) + "\n").encode())

    def go_on(self) -> frozenset[str]:
        """Remove the stop marker; return the trials that were cancelled with the sweep."""
        try:
            found = json.loads(self.storage.read(STOP_MARKER))["trials"]
        except FileNotFoundError:
            return frozenset()
        self.storage.delete(STOP_MARKER)
        return frozenset(map(str, found))

    @property
    def is_stopped(self) -> bool:
        return self.storage.exists(STOP_MARKER)


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else value


KEPT = "code.json"


@dataclass(frozen=True)
class Code:
    """A code snapshot in the sweep's own folder."""

    folder: RunFolder
    place: str
    """Same format as `Snapshot.place`."""
    limit_mb: float

    def give(self, trial: RunFolder) -> None:
        """Copy the snapshot into a trial's folder, so that the folder is self-contained."""
        file = archive(self.place.partition("/")[0])
        if not trial.storage.exists(file):
            trial.storage.create(file, self.folder.storage.read(file))

    def open(self) -> Path:
        """Unpack the snapshot on this machine and return its path."""
        return open_code(self.folder, self.place, self.limit_mb)


def keep(sweep: SweepFolder, plugins: Sequence[str], job: JobConfig) -> Code | None:
    """Return the sweep's code snapshot, taken by its first driver; None when no code was found.

    Later changes of the checkout have no effect.
    """
    folder = RunFolder(sweep.url)
    if not sweep.storage.exists(KEPT):
        found = take(folder, Path.cwd(), plugins, limit_mb=job.code_mb, keep=job.code_keep)
        if found.secrets:
            say(f"{', '.join(found.secrets)}: looks like a secret, left out of the code; job.code_keep takes it")
        place = found.place if found.files else None
        sweep.storage.create(KEPT, (json.dumps({"place": place}) + "\n").encode())
    place = kept_place(sweep)
    return None if place is None else Code(folder, place, job.code_mb)


def kept_place(sweep: SweepFolder) -> str | None:
    """Return the place of the sweep's code snapshot; None if it has none or none is taken yet."""
    try:
        place = json.loads(sweep.storage.read(KEPT))["place"]
    except FileNotFoundError:
        return None
    return None if place is None else str(place)


def sweep_at(word: str, root: str) -> SweepFolder | None:
    """Return the sweep of that name, path or URL; None when there is none."""
    urls = [word.rstrip("/")] if "://" in word or "/" in word else [join_url(root, word), word]
    return next((SweepFolder(url) for url in urls if open_storage(url).exists(SWEEP)), None)


def find_sweep(word: str, root: str) -> SweepFolder:
    """Return the sweep's folder. ConfigError with the nearest name when there is none."""
    found = sweep_at(word, root)
    if found is None and is_run(open_storage(join_url(root, word)).names()):
        raise ConfigError(f"{word} is a run and no sweep; 'everstep status {word}' shows it")
    if found is None:
        hint = nearest(word, names(root)) or f"; 'everstep ls {root}' shows which runs there are"
        raise ConfigError(f"{word}: there is no such sweep in {root}{hint}")
    return found
