"""The sweep's folder: everything that a driver knows lies here, so another can go on anywhere.

SWEEP/
  sweep.yaml                what is tried, and the composed configs; frozen
  records/00000001.json …   what was asked, told, promoted, cut: create-only, in one order
  leases/0001.json …        who drives it
  stop                      somebody has cancelled it
  batches/TOKEN.txt         run folders of the trials that were submitted together, a line each (launch/submit/array.py)
  trials/NAME/              ordinary run folders
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from everstep.errors import ConfigError, SupersededError
from everstep.launch.sweep.state import Story
from everstep.run_folder import STOP_MARKER, RunFolder
from everstep.storage import Storage, join_url, open_storage

SWEEP = "sweep.yaml"
RECORDS = "records"
TRIALS = "trials"
READERS = 16
"""Threads that read records at a time."""


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

    def story(self) -> Story:
        """All records up to the first that is missing."""
        names = [name for name in self.storage.names(RECORDS) if name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            texts = pool.map(lambda name: self.storage.read(f"{RECORDS}/{name}"), names)
            try:
                return Story.of(json.loads(text) for text in texts)
            except (ValueError, KeyError, IndexError, AttributeError) as error:
                raise ConfigError(f"a record in {self.url}/{RECORDS} is damaged: {error!r}") from error

    def append(self, story: Story, record: Mapping[str, Any]) -> None:
        """The next record. SupersededError when another driver has written it: it knows what we do not."""
        text = json.dumps(_without_nan(record), sort_keys=True) + "\n"
        if not self.storage.create(f"{RECORDS}/{story.length:08d}.json", text.encode()):
            raise SupersededError(f"another driver goes on with {self.url}; this one stops")
        story.apply(json.loads(text))

    def stop(self, by: str, trials: list[str]) -> None:
        """Leave the word that the sweep is cancelled, and which trials along with it."""
        self.storage.write(STOP_MARKER, (json.dumps({"by": by, "trials": trials}) + "\n").encode())

    def go_on(self) -> frozenset[str]:
        """Take the word back; the trials that were cancelled by it."""
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
    """JSON has no NaN; a value that is none is null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else value
