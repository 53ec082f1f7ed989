"""A compressed shard of a few bytes that declares gigabytes is refused before Arrow allocates them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from everstep.dataset import mapped_shard
from everstep.dataset.index import Column, ShardIndex
from everstep.dataset.inflated_size import inflated_bytes
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.verify import verify
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from support.hostile_sets import edit_index, index_of

ROWS = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_shard, "LARGEST_INFLATED", 1 << 20)


def shard_set(folder: Path, codec: str | None, said: str) -> Path:
    """Write a dataset of one shard of zeros, whose index says that it is compressed by `said`."""
    folder.mkdir()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    schema = pa.schema([("x", pa.int64())])
    path = str(folder / "shard-0.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(np.zeros(ROWS, np.int64))], names=["x"]))
    rows = ROWS if said != "none" or codec is None else 8  # an index with too many rows for its bytes is refused
    index_of(folder, {"x": Column("int64", ())}, rows)
    edit_index(folder, lambda document: document["attributes"].update(compression=said))
    return folder


def read(folder: Path, where: Path) -> ArrowDataset:
    data = ArrowDataset(str(folder), cache=lambda: ShardCache(str(where / "cache"), 10**9))
    data.take(np.array([0]))
    return data


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_shard_that_inflates_to_more_than_the_limit_is_refused(tmp_path: Path, codec: str, small: None) -> None:
    folder = shard_set(tmp_path / "set", codec, codec)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match=rf"it would be {8 * ROWS} bytes decompressed \(limit 1048576\)"):
        read(folder, tmp_path)
    (damage,) = verify(str(folder))
    assert "bytes decompressed (limit" in str(damage)
    assert pa.default_memory_pool().max_memory() <= before + (4 << 20)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_shard_of_an_index_without_compression_is_refused(tmp_path: Path, codec: str) -> None:
    folder = shard_set(tmp_path / "set", codec, "none")
    with pytest.raises(DataError, match="it is compressed, and the index says that it is not"):
        read(folder, tmp_path)
    (damage,) = verify(str(folder))
    assert "it is compressed" in str(damage)


@pytest.mark.parametrize(("codec", "said"), [("lz4", "lz4"), ("zstd", "zstd"), (None, "none")])
def test_sound_shards_are_read(tmp_path: Path, codec: str | None, said: str) -> None:
    folder = shard_set(tmp_path / "set", codec, said)
    assert ShardIndex.read(str(folder)).is_compressed == (codec is not None)
    assert verify(str(folder)) == []
    read(folder, tmp_path)


def test_positions_that_lead_out_of_the_file_are_refused(tmp_path: Path) -> None:
    sound = (shard_set(tmp_path / "set", "zstd", "zstd") / "shard-0.arrow").read_bytes()
    assert inflated_bytes(memoryview(sound)) == 8 * ROWS
    refused = 0
    for at in range(0, len(sound) - 4, 2):
        for value in (-1, 1 << 30, -(1 << 31)):
            damaged = bytearray(sound)
            struct.pack_into("<i", damaged, at, value)
            try:
                inflated_bytes(memoryview(bytes(damaged)))
            except ValueError:
                refused += 1
    assert refused > 100


def test_a_dataset_is_not_prepared_with_compressed_shards_too_large_to_read() -> None:
    with pytest.raises(ConfigError, match=r"shard_mib=4096 with compression=zstd: at most 1024"):
        PrepareOptions(compression="zstd", shard_mib=4096)
