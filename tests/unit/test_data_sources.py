"""Every format gives the samples that another tool wrote, cut anywhere, from a disk or a store."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.dataset.index import Column, ShardIndex
from everstep.dataset.prepare import prepare, prepare_arrays, prepare_frame, prepare_rows
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.readers.base import File
from everstep.dataset.readers.text import cut_lines, line_blocks
from everstep.errors import DataError
from support.preparation import read

ROWS = {
    "a": list(range(50)),
    "b": [n / 4 for n in range(50)],
    "text": [f"line {n}, ünïcode" for n in range(50)],
}


def write_parquet(folder: Path, rows: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(rows), folder / "rows.parquet", row_group_size=7)


def write_arrow(folder: Path, rows: dict[str, list[Any]]) -> None:
    table = pa.table(rows)
    with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def write_hf(folder: Path, rows: dict[str, list[Any]]) -> None:
    table = pa.table(rows)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def write_csv(folder: Path, rows: dict[str, list[Any]]) -> None:
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)


def write_jsonl(folder: Path, rows: dict[str, list[Any]]) -> None:
    pd.DataFrame(rows).to_json(folder / "rows.jsonl", orient="records", lines=True)


def write_gz(folder: Path, rows: dict[str, list[Any]]) -> None:
    pd.DataFrame(rows).to_json(folder / "rows.jsonl.gz", orient="records", lines=True)


WRITERS = [write_parquet, write_arrow, write_hf, write_csv, write_jsonl, write_gz]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("shard_mib", [64, 0.0005])
def test_tables_of_every_format_become_the_same_samples(
    tmp_path: Path, writer: Callable[[Path, dict[str, list[Any]]], None], shard_mib: float
) -> None:
    source, dst = tmp_path / "source", tmp_path / "set"
    source.mkdir()
    writer(source, ROWS)
    indexes = prepare(PrepareOptions(src=[str(source)], dst=str(dst), shard_mib=shard_mib, processes=1))
    assert read(dst).to_pydict() == ROWS
    assert indexes[""].columns == {
        "a": Column("int64"), "b": Column("float64"), "text": Column("str", (None,)),
    }  # fmt: skip
    assert (len(indexes[""].shards) > 1) == (shard_mib < 1)


@pytest.mark.parametrize("writer", WRITERS)
def test_columns_are_chosen_and_ordered_and_a_missing_one_is_named(
    tmp_path: Path, writer: Callable[[Path, dict[str, list[Any]]], None]
) -> None:
    (tmp_path / "source").mkdir()
    writer(tmp_path / "source", ROWS)
    src = [str(tmp_path / "source")]
    prepare(PrepareOptions(src=src, dst=str(tmp_path / "set"), columns=["text", "a"]))
    assert read(tmp_path / "set").column_names == ["text", "a"]
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        prepare(PrepareOptions(src=src, dst=str(tmp_path / "other"), columns=["txt"]))
    assert not (tmp_path / "other").exists()


def test_text_is_one_sample_a_line_without_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\r\ntwo é\n\nthree".encode())
    prepare(PrepareOptions(src=[str(tmp_path / "*.txt")], dst=str(tmp_path / "set")))
    assert read(tmp_path / "set").to_pydict() == {"text": ["one", "two é", "three"]}


@given(st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b""))), st.integers(1, 40), st.booleans())
def test_lines_cut_anywhere_by_bytes_are_all_read_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    path.write_bytes(content)
    pieces = cut_lines(File(str(path), len(content), ""), size)
    read_back = [(offset, block) for piece in pieces for offset, block in line_blocks(piece)]
    assert b"".join(block for _, block in read_back) == content
    assert all(content[offset : offset + len(block)] == block for offset, block in read_back)
    assert all(block.endswith(b"\n") for _, block in read_back[:-1])


def test_files_are_samples_of_bytes_and_name(tmp_path: Path) -> None:
    for name in ("b/two.bin", "a/one.bin", ".hidden", "_SUCCESS"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(name.encode() * 3)
    prepare(PrepareOptions(src=[str(tmp_path / "source")], dst=str(tmp_path / "set")))
    assert read(tmp_path / "set").to_pydict() == {
        "bytes": [b"a/one.bin" * 3, b"b/two.bin" * 3],
        "name": ["a/one.bin", "b/two.bin"],
    }


def test_images_have_their_folder_as_label_and_an_undecodable_one_is_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow tells which images cannot be decoded; it is not installed")
    for number, label in enumerate(("dog", "cat")):
        (tmp_path / "source" / label).mkdir(parents=True)
        image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "source" / label / "x.png")
    broken = tmp_path / "source" / "dog" / "y.png"
    broken.write_bytes(b"no image")
    options = {"src": [str(tmp_path / "source")], "dst": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"dog/y\.png cannot be decoded \(UnidentifiedImageError\): 1 bad .* max_bad=0"):
        prepare(PrepareOptions(**options))  # type: ignore[arg-type]
    index = prepare(PrepareOptions(**options, max_bad=1))[""]  # type: ignore[arg-type]
    rows = read(tmp_path / "set").to_pydict()
    assert rows["label"] == [0, 1]
    assert index.attributes["classes"] == ["cat", "dog"]
    assert image.open(io.BytesIO(rows["image"][1])).getpixel((0, 0)) == (0, 0, 0)
    assert [json.loads(line)["place"] for line in (tmp_path / "set" / "bad.jsonl").read_text().splitlines()] == [
        str(broken)
    ]


def test_webdataset_gives_a_column_for_each_extension(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in ("d/0", "d/1", "d/2"):
            for extension, content in (("jpg", key.encode()), ("cls", key[-1:].encode())):
                if (key, extension) != ("d/1", "cls"):
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    prepare(PrepareOptions(src=[str(tmp_path / "x.tar")], dst=str(tmp_path / "set"), max_bad=1))
    assert read(tmp_path / "set").to_pydict() == {"key": ["d/0", "d/2"], "jpg": [b"d/0", b"d/2"], "cls": [0, 2]}
    assert "d/1" in (tmp_path / "set" / "bad.jsonl").read_text()


def test_numpy_files_keep_shape_and_type(tmp_path: Path) -> None:
    array = np.arange(600, dtype=">f4").reshape(100, 2, 3)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array, y=np.arange(100, dtype=np.uint8))
    prepare(PrepareOptions(src=[str(tmp_path / "x.npy")], dst=str(tmp_path / "npy"), shard_mib=0.0005, processes=1))
    index = prepare(PrepareOptions(src=[str(tmp_path / "x.npz")], dst=str(tmp_path / "npz")))[""]
    assert index.columns == {"x": Column("float32", (2, 3)), "y": Column("uint8")}
    assert read(tmp_path / "npy").to_pydict()["values"] == array.tolist()
    assert read(tmp_path / "npz").to_pydict() == {"x": array.tolist(), "y": list(range(100))}


def test_a_frame_arrays_and_a_generator_come_from_memory(tmp_path: Path) -> None:
    prepare_frame(pd.DataFrame(ROWS), str(tmp_path / "frame"))
    assert read(tmp_path / "frame").to_pydict() == ROWS
    tokens = np.arange(1000, dtype=np.uint16).reshape(-1, 10)
    prepare_arrays({"tokens": tokens}, str(tmp_path / "arrays"), shard_mib=0.0005)
    assert read(tmp_path / "arrays").to_pydict() == {"tokens": tokens.tolist()}

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(2500):
            yield {"x": np.full((2, 2), n, np.float32), "ids": [n] * (n % 3), "name": str(n)}

    index = prepare_rows(rows, str(tmp_path / "rows"))[""]
    assert index.columns == {
        "x": Column("float32", (2, 2)), "ids": Column("int64", (None,)), "name": Column("str", (None,)),
    }  # fmt: skip
    read_back = read(tmp_path / "rows").to_pydict()
    assert read_back["ids"] == [[n] * (n % 3) for n in range(2500)]
    assert read_back["x"][-1] == [[2499.0] * 2] * 2


def test_a_dataset_is_a_source_too(tmp_path: Path) -> None:
    prepare_frame(pd.DataFrame(ROWS), str(tmp_path / "set"), shard_mib=0.0005)
    prepare(PrepareOptions(src=[str(tmp_path / "set")], dst=str(tmp_path / "again"), columns=["b"]))
    assert read(tmp_path / "again").to_pydict() == {"b": ROWS["b"]}


def test_a_generator_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_of_mine.py").write_text("def rows():\n    for n in range(5):\n        yield {'n': n}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    prepare(PrepareOptions(src=["rows_of_mine:rows"], dst=str(tmp_path / "set"), format="generator"))
    assert read(tmp_path / "set").to_pydict() == {"n": list(range(5))}
    sys.modules.pop("rows_of_mine")


def test_sources_and_datasets_lie_in_a_store(s3: str, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("s3")
    for number in range(3):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"a": [number * 10 + n for n in range(10)]}), file)
        store.pipe_file(f"{s3}/lake/deep/{number}.parquet", file.read_bytes())
    near = prepare(PrepareOptions(src=[str(tmp_path / "*.parquet")], dst=str(tmp_path / "set")))[""]
    far = prepare(PrepareOptions(src=[f"{s3}/lake/**/*.parquet"], dst=f"{s3}/set"))[""]
    assert far.digest == near.digest
    assert ShardIndex.read(f"{s3}/set").digest == near.digest
    again = prepare(PrepareOptions(src=[f"{s3}/lake"], dst=f"{s3}/other"))[""]
    assert again.digest == near.digest
    assert {name.rsplit("/", 1)[1] for name in store.find(f"{s3}/set")} == {"index.json", near.shards[0].file}
