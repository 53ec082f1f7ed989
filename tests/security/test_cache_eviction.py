"""Eviction removes files of the cache, and no others, whatever folder a config names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from everstep.errors import ConfigError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.cache.folder import MARK
from support.shard_datasets import numbered, write_dataset


def read_through(tmp_path: Path, folder: Path) -> None:
    """Read a compressed dataset of two shards through a cache that is too small for one."""
    if not (tmp_path / "set").exists():
        write_dataset(tmp_path / "set", [4, 4], numbered(8), "lz4")
    data = ArrowDataset(str(tmp_path / "set"), cache=lambda: ShardCache(str(folder), 1000))
    assert data.take(np.arange(8))["id"].tolist() == list(range(8))


def test_a_folder_with_files_of_others_is_refused_and_they_stay(tmp_path: Path) -> None:
    shards = tmp_path / "victim" / "shards"
    shards.mkdir(parents=True)
    (shards / "only-copy.arrow").write_bytes(os.urandom(1 << 20))
    with pytest.raises(ConfigError, match=r"loader\.cache=.*victim: .*shards holds files that are no cache \('only"):
        read_through(tmp_path, tmp_path / "victim")
    assert [path.name for path in shards.iterdir()] == ["only-copy.arrow"]


def test_files_that_come_later_into_a_cache_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    read_through(tmp_path, folder)
    assert (folder / MARK).exists()
    others = [folder / "shards" / name for name in ("notes.txt", "only-copy.arrow", "a" * 31 + ".arrow", "b" * 40)]
    for other in others:
        other.write_bytes(bytes(1 << 20))
        os.utime(other, (0, 0))
    read_through(tmp_path, folder)
    assert all(other.stat().st_size == 1 << 20 for other in others)


def test_a_cache_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    read_through(tmp_path, folder)
    (folder / MARK).unlink()
    read_through(tmp_path, folder)
    assert (folder / MARK).exists()


def test_shards_that_are_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shards").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="its folder shards is a link"):
        read_through(tmp_path, tmp_path / "cache")
    assert list((tmp_path / "precious").iterdir()) == []
