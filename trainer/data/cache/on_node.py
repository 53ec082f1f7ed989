"""Cache that the processes of one node share for remote shards."""

from __future__ import annotations

import os
import shutil

from everstep.config import LoaderConfig
from everstep.trainer.data.cache import ShardCache

SHARE_OF_DISK = 0.5


def node_cache(loader: LoaderConfig | None = None) -> ShardCache:
    """Return the cache of this user on this node, set by the keys under `loader`.

    Nothing is written before the cache is used.
    """
    loader = loader or LoaderConfig()
    default = os.environ.get("EVERSTEP_CACHE", os.path.join("~", ".cache", "everstep"))
    folder = os.path.abspath(os.path.expanduser(loader.cache or default))
    limit = int(loader.cache_gb * 1e9) if loader.cache_gb is not None else int(_disk(folder) * SHARE_OF_DISK)
    return ShardCache(folder, limit)


def _disk(folder: str) -> int:
    """Return the size in bytes of the disk on which a folder is, or will be."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).total
