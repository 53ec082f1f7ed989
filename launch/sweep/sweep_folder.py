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

    def story(self) -> Story:
        """Replay all records. ConfigError for a damaged one."""
        names = [name for name in self.storage.names(RECORDS) if name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            texts = pool.map(lambda name: self.storage.read(f"{RECORDS}/{name}"), names)
            try:
                return Story.of(json.loads(text) for text in texts)
            except (ValueError, KeyError, IndexError, AttributeError) as error:
                raise ConfigError(f"a record in {self.url}/{RECORDS} is damaged: {error!r}") from error

    def append(self, story: Story, record: Mapping[str, Any]) -> None:
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
