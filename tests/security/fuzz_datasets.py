"""Indexes and shards of datasets, mutated: refused in one line, or the rows that an honest reader finds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.dataset.index import Column, ShardIndex
from everstep.dataset.verify import verify
from everstep.errors import DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.columns import Ragged
from support.hostile_sets import index_of, ragged_set
from support.mutations import EXAMPLES, check_one_line, contents, documents
from support.shard_datasets import numbered, write_dataset

OFFSETS = [0, 16, 32, 48]
LIMITS = [0, 1, 15, 16, 48, 63, 64, 65, 4096, -1, -16, 2**31, 2**45, 2**62, 2**63 - 1, -(2**62), -(2**63)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="everstep-fuzz-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def honest(folder: Path) -> dict[str, Any]:
    write_dataset(folder / "index", [3, 2], {**numbered(5), "text": ["a", "", "bc", "d", "efg"]})
    return dict(json.loads((folder / "index" / "index.json").read_text()))


def sealed(data: bytes) -> bytes:
    """The document with the digest that fits, so that more than the digest is tested."""
    try:
        document = json.loads(data)
        content = [
            sorted((name, column["type"], column["shape"]) for name, column in document["columns"].items()),
            [(s["rows"], blake3("".join(s["parts"]).encode()).hexdigest(length=16)) for s in document["shards"]],
        ]
        document["digest"] = blake3(json.dumps(content).encode()).hexdigest()
        return json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_a_mutated_index_is_refused_in_one_line_or_its_rows_are_those_of_the_files(
    folder: Path, honest: dict[str, Any], data: st.DataObject
) -> None:
    mutated = sealed(data.draw(documents(honest)))
    (folder / "index" / "index.json").write_bytes(mutated)
    try:
        read = ArrowDataset(str(folder / "index"))
        rows = read.take(np.arange(len(read)))
    except DataError as refused:
        check_one_line(refused)
        return
    document = json.loads(mutated)
    assert set(rows) == set(document["columns"])
    assert len(read) == sum(shard["rows"] for shard in document["shards"])
    files = [folder / "index" / shard["file"] for shard in document["shards"]]
    expected = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    for name, column in rows.items():
        values = [value for table in expected for value in table[name].to_pylist()]
        if isinstance(column, Ragged):
            found = [column.bytes(row) for row in range(len(column))]
            assert found == [value.encode() if isinstance(value, str) else value for value in values]
        else:
            assert column.tolist() == np.array(values).reshape(column.shape).tolist()


def check_shard(path: Path, rows: int, kind: str) -> None:
    """Every row that is read is part of the file; if Arrow's own full validation accepts it, the very same."""
    content = path.read_bytes()
    data = ArrowDataset(str(path.parent))
    found: dict[int, bytes] = {}
    for row in range(rows):
        try:
            column = data.take(np.array([row]))["text"]
        except DataError as refused:
            check_one_line(refused)
            continue
        assert isinstance(column, Ragged)
        found[row] = column.bytes(0)
        assert found[row] in content, "a row holds bytes that are not the file's"
    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
        expected = table["text"].to_pylist()
    except (pa.ArrowException, KeyError, OSError, ValueError):
        expected = []
    if len(found) == rows and len(expected) == rows:
        assert [found[row] for row in range(rows)] == [
            value if kind == "bytes" else np.array(value, kind).tobytes() for value in expected
        ]
    if len(found) < rows:
        assert verify(str(path.parent)), "verify calls a dataset whole that cannot be read"


@settings(max_examples=EXAMPLES)
@given(
    offsets=st.lists(st.sampled_from(LIMITS) | st.integers(-80, 80), min_size=3, max_size=5),
    kind=st.sampled_from(["bytes", "int32"]),
)
def test_any_offsets_are_refused_or_give_bytes_of_the_file(folder: Path, offsets: list[int], kind: str) -> None:
    ragged_set(folder / f"offsets-{kind}", offsets, kind)
    check_shard(folder / f"offsets-{kind}" / "shard-0.arrow", len(offsets) - 1, kind)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), kind=st.sampled_from(["bytes", "int32"]))
def test_any_bytes_of_a_shard_are_refused_or_give_bytes_of_the_file(
    folder: Path, data: st.DataObject, kind: str
) -> None:
    into = ragged_set(folder / f"bytes-{kind}", OFFSETS, kind)
    path = into / "shard-0.arrow"
    path.write_bytes(data.draw(contents(path.read_bytes())) or b"0")
    index_of(into, {"text": Column(kind, (None,))}, len(OFFSETS) - 1)
    assert ShardIndex.read(str(into)).rows == len(OFFSETS) - 1
    check_shard(path, len(OFFSETS) - 1, kind)
