"""Groups of config keys about data: order, exclusions and loader."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from everstep.config.choices import (
    Worker,
    require,
)


@dataclass(kw_only=True)
class OrderConfig:
    shuffle: bool = True
    """false: each dataset in its stored order, epoch after epoch."""
    window: int | None = 64
    """Shards whose samples are mixed at a time; null mixes all. Each node needs about this many locally."""
    lanes: int = 1
    """Streams with separate shards, from which a global batch takes its microbatches in turn.

    With as many as there are processes, or a multiple, a node reads only its share of the shards. A sample stays in its
    lane for an epoch.
    """
    length_column: str | None = None
    """Column by whose length samples are sorted, so that microbatches need little padding; null: none."""
    length_window: int = 8
    """Global batches whose samples are sorted together."""

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 1, "order.window", self.window, "must be ≥ 1 shard or null")
        require(self.lanes >= 1, "order.lanes", self.lanes, "must be ≥ 1")
        require(self.length_window >= 1, "order.length_window", self.length_window, "must be ≥ 1 global batch")
        require(
            self.length_column is None or self.lanes == 1,
            "order.length_column",
            self.length_column,
            "sorting would mix the lanes of order.lanes; set order.lanes=1",
        )


@dataclass(kw_only=True)
class ExcludeConfig:
    from_step: int = 1
    """First step without the samples, as the log counts steps; on resume it must be after the checkpoint."""
    samples: list[int] = field(default_factory=list)
    """Sample ids, as `everstep data trace` prints them."""
    requested: bool = False
    """True for `everstep data exclude`: later command lines of the run do not have to name it again."""

    def __post_init__(self) -> None:
        require(self.from_step >= 1, "exclude.from_step", self.from_step, "must be ≥ 1")
        require(all(sample >= 0 for sample in self.samples), "exclude.samples", self.samples, "must be ≥ 0")


@dataclass(kw_only=True)
class PolicyConfig:
    allow_tags: list[str] | None = None
    """Tags that datasets of the run may have, as license:CC0 or license:*; null is no policy.

    With a policy each dataset needs a tag of each name in it, and none that is not allowed.
    """

    def __post_init__(self) -> None:
        for entry in self.allow_tags or ():
            name, colon, value = entry.partition(":")
            known = bool(colon and name.strip() and value.strip())
            require(known, "policy.allow_tags", entry, "must be NAME:VALUE, such as license:CC0, or NAME:*")


@dataclass(kw_only=True)
class LoaderConfig:
    prefetch: int = 2
    """Steps of data to prepare ahead; 0 reads on demand, small samples for some steps at once.

    Code of your own, which may draw random numbers, runs between steps unless there are workers.
    """
    workers: int = 0
    """Processes or threads per rank that read and transform; 0 reads in one thread of the trainer."""
    worker: Worker = Worker.process
    """thread: less memory, no copies between processes; for work that waits for disks or releases the GIL.

    Code of your own always runs in processes.
    """
    ahead_mb: int = 256
    """MB of remote data to fetch ahead; 0 fetches on demand."""
    cache: str | None = None
    """Folder on the node's own disk for the cache of remote shards, shared by all its processes.

    null is $EVERSTEP_CACHE or ~/.cache/everstep.
    """
    cache_gb: float | None = None
    """Largest size of that folder in GB; least recently used shards are removed. null is half of the disk."""

    def __post_init__(self) -> None:
        require(self.prefetch >= 0, "loader.prefetch", self.prefetch, "must be ≥ 0")
        require(self.workers >= 0, "loader.workers", self.workers, "must be ≥ 0")
        require(self.ahead_mb >= 0, "loader.ahead_mb", self.ahead_mb, "must be ≥ 0")
        require(self.cache_gb is None or self.cache_gb > 0, "loader.cache_gb", self.cache_gb, "must be > 0 or null")

    def cache_folder(self) -> str:
        """Return the folder of the cache on this node."""
        default = os.environ.get("EVERSTEP_CACHE", os.path.join("~", ".cache", "everstep"))
        return os.path.abspath(os.path.expanduser(self.cache or default))


def first_steps_without(excludes: Iterable[ExcludeConfig]) -> dict[int, int]:
    """Return the first step without each excluded sample."""
    first: dict[int, int] = {}
    for exclude in excludes:
        for sample in exclude.samples:
            first[sample] = min(exclude.from_step, first.get(sample, exclude.from_step))
    return first
