"""Manifests and tables of tensors, mutated: refused in one line, or what another reader finds in them."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from hypothesis import given, settings

from everstep.trainer.checkpoint.manifest import TENSORS, FileRecord, Manifest
from everstep.trainer.checkpoint.tensor_table import ITEM_BYTES, parse_table
from support.mutations import EXAMPLES, check_one_line, documents

MANIFEST = Manifest(
    step=4, attempt=1, samples=32, world=2, parallel="fsdp", time=1.7e9, config_digest="c", data_digest="d",
    progress={"step": 4, "items": 9, "metric": 0.5, "best": None, "passed_over": [[1, 2]], "evaluated": -1},
    values={"model": {"extra": [1, "x"]}, "frozen": []}, metric=0.5,
    files={TENSORS: FileRecord(99, "0" * 64), "rank-0000.tensors": FileRecord(528, "1" * 64)},
)  # fmt: skip
FILES = {f"rank-000{rank}.tensors": FileRecord(512, "") for rank in (0, 1)}


def chunk(rank: int, start: int, offsets: list[int], sizes: list[int]) -> dict[str, Any]:
    length = 4 * int(np.prod(sizes))
    return {"offsets": offsets, "sizes": sizes, "file": f"rank-000{rank}.tensors", "start": start, "length": length}


TABLE = {
    "model.weight": {
        "dtype": "float32", "shape": [4, 6],
        "chunks": [chunk(rank, 64 * part, [2 * rank, 3 * part], [2, 3]) for rank in (0, 1) for part in (0, 1)],
    },
    "model.bias": {"dtype": "int32", "shape": [3], "chunks": [chunk(0, 192, [0], [2]), chunk(1, 192, [2], [1])]},
    "optimizer.step": {"dtype": "float32", "shape": [], "chunks": [chunk(0, 256, [], [])]},
    "empty": {"dtype": "float32", "shape": [0, 3], "chunks": []},
}  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(documents(json.loads(MANIFEST.to_json())))
def test_a_mutated_manifest_is_refused_in_one_line_or_read_to_the_letter(data: bytes) -> None:
    try:
        read = Manifest.from_json(data)
    except ValueError as refused:
        check_one_line(refused)
        return
    honest = json.loads(data)
    assert json.dumps(asdict(read), sort_keys=True) == json.dumps(honest, sort_keys=True)
    assert all(type(record["bytes"]) is int and record["bytes"] >= 0 for record in honest["files"].values())


@settings(max_examples=EXAMPLES)
@given(documents(TABLE))
def test_a_mutated_table_is_refused_in_one_line_or_every_element_comes_once_from_its_files(data: bytes) -> None:
    try:
        table = parse_table(data, FILES)
    except ValueError as refused:
        check_one_line(refused)
        return
    honest = json.loads(data)
    assert table.keys() == honest.keys()
    for name, entry in table.items():
        assert (entry.dtype, list(entry.shape)) == (honest[name]["dtype"], honest[name]["shape"])
        written = np.zeros(entry.shape if np.prod(entry.shape, dtype=float) else (0,), np.int8)
        for piece in entry.pieces:
            assert 0 <= piece.start <= piece.start + piece.length <= FILES[piece.file].bytes
            assert piece.length == np.prod(piece.sizes, dtype=float) * ITEM_BYTES[entry.dtype]
            for place in product(*(range(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))):
                written[place] += 1
        assert (written == 1).all()
