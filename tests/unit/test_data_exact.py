"""Tables, archives, text and images: each value comes out as it went in, or its file and row are named."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.dataset.prepare import prepare_frame, prepare_rows
from everstep.dataset.readers import parquet
from everstep.dataset.readers import text as lines
from everstep.errors import DataError
from support.preparation import outcome, read

NUMBERS = [
    pa.int8(),
    pa.int32(),
    pa.int64(),
    pa.uint64(),
    pa.float32(),
    pa.float64(),
    pa.float16(),
    pa.decimal128(20, 2),
]
VALUES = st.one_of(
    st.integers(-100, 100),
    st.sampled_from([2**24 + 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 0.5, 0.1, float("nan"), 1e300, 16777217.0]),
)


def numbers(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Those of the values that the type holds as they are."""
    found: list[Any] = []
    for value in values:
        try:
            given_value = decimal.Decimal(repr(value)) if pa.types.is_decimal(kind) else value
            one = pa.array([np.float16(value) if pa.types.is_float16(kind) else given_value], kind)
            back = one[0].as_py()
            if back == value or (back != back and value != value):
                found.append(one)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, decimal.InvalidOperation):
            continue
    return pa.concat_arrays(found) if found else pa.array([], kind)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, decimal.Decimal):
        one, other = str(one.normalize()), str(decimal.Decimal(repr(other)).normalize())
    return bool(one == other or (one != one and other != other))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(NUMBERS), st.lists(VALUES, min_size=1, max_size=4)), min_size=1, max_size=4),
    st.booleans(),
)
def test_parquet_files_of_other_types_come_out_with_equal_numbers_or_are_named(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[pa.DataType, list[Any]]], looked: bool
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    given_values: list[tuple[str, Any]] = []
    for number, (kind, values) in enumerate(files):
        column = numbers(values, kind)
        pq.write_table(pa.table({"x": column}), folder / f"{number}.parquet")
        given_values += [(f"{number}.parquet: row {row}", value) for row, value in enumerate(column.to_pylist(), 1)]
    with pytest.MonkeyPatch.context() as patch:
        if looked:  # at the first file alone, as where there are too many
            patch.setattr(parquet, "spread", lambda files: files[:1])
        found = outcome(folder)
    named = {place.rsplit("/", 1)[1] for place in found.places}
    kept = [value for place, value in given_values if place not in named]
    assert len(kept) == found.table.num_rows
    assert all(map(equal, kept, found.table["x"].to_pylist()))


def test_decimals_that_no_float_holds_are_named(tmp_path: Path) -> None:
    values = [decimal.Decimal(text) for text in ("0.10", "9007199254740993.00", "-12.50", "1234567890123456.78")]
    pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
    found = outcome(tmp_path / "a.parquet")
    assert found.table["x"].to_pylist() == [0.1, -12.5]
    assert [place[-5:] for place in found.places] == ["row 2", "row 4"]


def test_a_file_with_another_column_or_kind_is_refused_wherever_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "spread", lambda files: files[:1])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [2], "late": [3]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has a column 'late', which comes too late; choose columns="):
        outcome(tmp_path)
    assert outcome(tmp_path, columns=["x"]).table["x"].to_pylist() == [1, 2]
    for kind, values in (("string", ["2"]), ("bool", [True]), ("binary", [b"2"])):
        pq.write_table(pa.table({"x": values}), tmp_path / "b.parquet")
        found = outcome(tmp_path)
        assert (found.table["x"].to_pylist(), len(found.places)) == ([1], 1), kind


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([[1], [2]], names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'x' twice"):
        outcome(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'x' twice"):
        prepare_frame(table, str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("folders", "kind"), [(["year=2019", "year=2020"], int), (["m=01", "m=12"], str), (["a=x%20y", "a=z"], str)]
)
def test_hive_folders_are_columns(tmp_path: Path, folders: list[str], kind: type) -> None:
    for number, folder in enumerate(folders):
        (tmp_path / "src" / folder).mkdir(parents=True)
        pq.write_table(pa.table({"n": [number]}), tmp_path / "src" / folder / "0.parquet")
    name = folders[0].split("=")[0]
    values = [kind(folder.split("=")[1].replace("%20", " ")) for folder in folders]
    assert outcome(tmp_path / "src").rows == [{"n": number, name: value} for number, value in enumerate(values)]
    assert outcome(tmp_path / "src", columns=[name]).rows == [{name: value} for value in values]
    assert outcome(tmp_path / "src", columns=["n"]).rows == [{"n": 0}, {"n": 1}]


def test_hive_folders_that_contradict_the_file_or_each_other_are_named(tmp_path: Path) -> None:
    (tmp_path / "src" / "y=1").mkdir(parents=True)
    (tmp_path / "src" / "y=1" / "a.csv").write_text("n,y\n5,1\n6,2\n")
    found = outcome(tmp_path / "src")
    assert found.rows == [{"n": 5, "y": 1}]
    assert found.places == [f"{tmp_path}/src/y=1/a.csv: row 2"]
    (tmp_path / "src" / "b.csv").write_text("n,y\n5,1\n")
    with pytest.raises(DataError, match="differ in folders COLUMN=VALUE"):
        outcome(tmp_path / "src")


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_compressed_file_that_is_cut_is_named_and_its_rows_before_are_kept(
    tmp_path: Path, name: str, suffix: str
) -> None:
    texts = {"a.jsonl": [f'{{"n": {n}}}' for n in range(5000)], "a.csv": ["n", *map(str, range(5000))]}
    text = "\n".join(texts.get(name, list(map(str, range(5000))))) + "\n"
    whole = COMPRESSORS[suffix](text.encode())
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(whole)
    rows = outcome(file).rows
    assert len(rows) == 5000
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        (tmp_path / f"0{name}").write_text(text[:200].rpartition("\n")[0] + "\n")
        found = outcome(tmp_path)
        count = len(outcome(tmp_path / f"0{name}").rows)
        assert found.rows[count:] == rows[: len(found.rows) - count]
        assert len(found.places) == 1
        assert file.name in found.places[0]
        assert "cut short" in found.reasons[0] or "is empty" in found.reasons[0]


def test_a_cut_archive_counts_as_one_bad_record(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\n" % n for n in range(10)))
    for name, content in (("a.txt.gz", whole), ("b.txt.gz", whole[:-4])):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        DataError, match=r"b\.txt\.gz after row 0 is cut short or damaged: .* what follows is lost: 1 bad"
    ):
        outcome(tmp_path, max_bad=0)
    assert outcome(tmp_path, max_bad=1).table.num_rows == 10


def tar(folder: Path, files: list[tuple[str, bytes]], name: str = "a.tar") -> Path:
    with tarfile.open(folder / name, "w") as archive:
        for file, content in files:
            info = tarfile.TarInfo(file)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / name


KEYS = st.sampled_from(["d/0", "d/1", "2", "ä"])
FILES = st.lists(
    st.tuples(KEYS, st.sampled_from(["jpg", "JPG", "cls", "json"]), st.sampled_from([b"1", b"x", b"", b" 7\n"])),
    min_size=1,
)


@settings(max_examples=200)
@given(FILES, st.sampled_from([".tar", ".tar.gz", ".TGZ"]))
def test_samples_of_a_tar_come_out_as_they_are_or_are_named(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, str, bytes]], suffix: str
) -> None:
    path = tar(tmp_path_factory.mktemp("tar"), [(f"{key}.{extension}", content) for key, extension, content in files])
    content = path.read_bytes()
    path = path.with_name(f"b{suffix}")
    path.write_bytes(content if suffix == ".tar" else gzip.compress(content))
    found = outcome(path)
    samples: list[tuple[str, list[tuple[str, bytes]]]] = []
    for key, extension, data in files:
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append((extension.lower(), data))
    names = {name for _, sample in samples for name, _ in sample}
    good = []
    for key, sample in samples:
        whole = dict(sample)
        number = whole.get("cls", b"0").strip()
        if len(whole) == len(sample) and set(whole) == names and number.isdigit():
            good.append({"key": key, **whole} | ({"cls": int(number)} if "cls" in whole else {}))
    assert found.rows == good
    assert len(found.places) == len(samples) - len(good)


def test_a_tar_that_is_cut_damaged_or_goes_on_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path, [(f"{n}.txt", b"%d" % n * 300) for n in range(6)])
    whole = path.read_bytes()
    rows = outcome(path).rows
    for cut in (512 * 2, 512 * 3 - 100, 512 * 4, 512 * 4 + 100, 512 * 11):
        path.write_bytes(whole[:cut])
        found = outcome(path)
        assert found.rows == rows[: len(found.rows)]
        assert len(found.places) == 1
    path.write_bytes(whole[:1024] + b"#" * 512 + whole[1536:])
    assert (outcome(path).rows, len(outcome(path).places)) == (rows[:1], 1)
    path.write_bytes(whole + whole)
    assert (outcome(path).rows, len(outcome(path).places)) == (rows, 1)


def test_a_column_that_comes_late_in_a_tar_is_a_column(tmp_path: Path) -> None:
    files = [("0.jpg", b"-"), ("1.jpg", b"-"), ("1.cls", b"1"), ("2.jpg", b"-"), ("2.cls", b"2")]
    found = outcome(tar(tmp_path, files))
    assert [row["cls"] for row in found.rows] == [1, 2]
    assert found.places == [f"{tmp_path}/a.tar: 0"]
    assert outcome(tmp_path / "a.tar", columns=["jpg"]).table.num_rows == 3


def test_links_and_files_without_extension_of_a_tar_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("0.jpg", tarfile.REGTYPE),
            ("1.jpg", tarfile.LNKTYPE),
            ("README", tarfile.REGTYPE),
            ("._x.jpg", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg" if kind == tarfile.LNKTYPE else ""
            archive.addfile(info)
    found = outcome(path)
    assert found.table.num_rows == 1
    assert [place.rsplit(" ", 1)[1] for place in found.places] == ["1.jpg", "README"]


TEXTS = st.lists(st.text(st.sampled_from("aé\r\0\u2028\ufeff "), max_size=4), min_size=1, max_size=12)


@settings(max_examples=300)
@given(
    TEXTS,
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.integers(4, 20),
    st.integers(4, 40),
)
def test_lines_of_text_come_out_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, encoding: str, block: int, unit: int
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.TXT"
    text = end.join(texts).lstrip("\0")  # of which no mark could be told apart
    file.write_bytes((text if not text.startswith("\ufeff") else " " + text).encode(encoding))
    plain = file.read_bytes().decode(encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        found = outcome(file, shard_mib=unit / 2**20)
    expected = [line.removesuffix("\r") for line in plain.split("\n")[:-1]] + [plain.split("\n")[-1]]
    assert found.table["text"].to_pylist() == [line for line in expected if line]
    assert found.places == []


def rows_of(values: list[Any]) -> Callable[[], Iterator[dict[str, Any]]]:
    return lambda: ({"x": value} for value in values)


DAY, NOON = datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 12)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ([1] * 2000 + [0.5, 2.0], [1] * 2000 + [2]),
        ([0.5] * 2000 + [1, 2**53 + 1], [0.5] * 2000 + [1.0]),
        ([1, 2**63], [1, 2**63]),
        ([1, True, 2], [1, 2]),
        ([1, np.True_, 2], [1, 2]),
        ([1] * 2000 + [True, "3", None], [1] * 2000),
        (["a"] * 2000 + [7, "007"], ["a"] * 2000 + ["007"]),
        ([np.float32(0.5)] * 1500 + [0.1, 0.25], [0.5] * 1500 + [0.25]),
        ([NOON, DAY, NOON], [1577880000000000] * 2),
        ([NOON, NOON.replace(tzinfo=datetime.UTC), NOON], [1577880000000000] * 2),
        ([np.array([2**53 + 1]), np.array([0.5])], [[2**53 + 1]]),
        ([np.array([1]), np.array([2.0])], [[1], [2]]),
        ([[1], [0.5, 2]], [[1.0], [0.5, 2.0]]),
        ([[1], [2, True], [3]], [[1], [3]]),
        ([2**70, 1], [1]),
    ],
)  # fmt: skip
def test_rows_of_a_generator_keep_their_values_or_are_named(tmp_path: Path, values: list[Any], kept: list[Any]) -> None:
    prepare_rows(rows_of(values), str(tmp_path / "set"), max_bad=len(values))
    assert read(tmp_path / "set")["x"].to_pylist() == kept
    bad = tmp_path / "set" / "bad.jsonl"
    told = bad.read_text().count("\n") if bad.exists() else 0
    assert told == len(values) - len(kept)


def test_columns_of_a_generator_that_come_late_are_told(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"a": 1}
        yield {"a": 2, "b": 3}
        yield from ({"a": n, "b": n} for n in range(2000))
        yield {"a": 4, "b": 5, "c": 6}

    with pytest.raises(DataError, match="row 1 has no column 'b'"):
        prepare_rows(rows, str(tmp_path / "set"))
    prepare_rows(rows, str(tmp_path / "set"), max_bad=2)
    assert read(tmp_path / "set").num_rows == 2001
    assert "has a column 'c', which comes too late" in (tmp_path / "set" / "bad.jsonl").read_text()
    prepare_rows(rows, str(tmp_path / "other"), columns=["a"])
    assert read(tmp_path / "other").num_rows == 2003
