"""Records that cannot be read are counted, named by place and reason, and left out; their content is told nowhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from everstep.dataset.prepare import prepare, prepare_rows
from everstep.dataset.prepare.options import PrepareOptions
from everstep.errors import DataError
from support.preparation import read

BAD_LINES = ['{"a": 1, "b": "x"}', "{oops", '{"a": "x", "b": "y"}', "[1]", "", '{"a": 2}', '{"a": 3, "b": "z"}']


def test_bad_lines_are_counted_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes("\n".join(BAD_LINES).encode() + b'\n{"a": 4, "b": "\xff"}\n')
    options = {"src": [str(tmp_path / "x.jsonl")], "dst": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"x\.jsonl: line \d .* 5 bad so far, max_bad=3; .*max_bad= higher") as caught:
        prepare(PrepareOptions(**options, max_bad=3))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert (tmp_path / "set" / "bad.jsonl").exists()
    prepare(PrepareOptions(**options, max_bad=5))  # type: ignore[arg-type]
    assert read(tmp_path / "set").to_pydict() == {"a": [1, 3], "b": ["x", "z"]}
    bad = [json.loads(line) for line in (tmp_path / "set" / "bad.jsonl").read_text().splitlines()]
    assert {entry["place"].rsplit(" ", 1)[1] for entry in bad} == {"2", "3", "4", "6", "8"}
    assert not any("oops" in entry["reason"] for entry in bad)


def test_bad_cells_and_rows_of_a_csv_are_named_by_row(tmp_path: Path) -> None:
    good = "".join(f'{n},"quoted\n{n}"\n' for n in range(100_000))
    (tmp_path / "x.csv").write_text(f"n,s\n{good}two,SECRET\n3,c,d\n,e\n6,f\n")
    prepare(PrepareOptions(src=[str(tmp_path / "x.csv")], dst=str(tmp_path / "set"), max_bad=3))
    rows = read(tmp_path / "set").to_pydict()
    assert rows["n"] == [*range(100_000), 6]
    assert rows["s"][-2:] == ["quoted\n99999", "f"]
    bad = [json.loads(line) for line in (tmp_path / "set" / "bad.jsonl").read_text().splitlines()]
    assert {entry["place"].rsplit(" ", 1)[1] for entry in bad} == {"100001", "100002", "100003"}
    assert {entry["reason"] for entry in bad} == {
        "column 'n': does not fit int64", "has 3 cells where the header names 2",
    }  # fmt: skip


def test_csv_files_whose_columns_disagree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,s\n0,z\n")
    (tmp_path / "b.csv").write_text("n,s\nx,z\n")
    with pytest.raises(DataError, match="not of the same types"):
        prepare(PrepareOptions(src=[str(tmp_path / "*.csv")], dst=str(tmp_path / "set")))
    (tmp_path / "b.csv").write_text("n,t\n1,z\n")
    with pytest.raises(DataError, match=r"b\.csv and .*a\.csv differ in columns s, t"):
        prepare(PrepareOptions(src=[str(tmp_path / "*.csv")], dst=str(tmp_path / "set")))


def test_null_values_are_bad_records(tmp_path: Path) -> None:
    table = pa.table({"n": [1, None, 3, 4], "l": [[1], [2], [None], [4, 4]]})
    pq.write_table(table, tmp_path / "x.parquet")
    options = {"src": [str(tmp_path / "x.parquet")], "dst": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"x\.parquet: row 2 column 'n': is null: 2 bad so far, max_bad=0"):
        prepare(PrepareOptions(**options))  # type: ignore[arg-type]
    prepare(PrepareOptions(**options, max_bad=2))  # type: ignore[arg-type]
    assert read(tmp_path / "set").to_pydict() == {"n": [1, 4], "l": [[1], [4, 4]]}


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"good\n\nb\xffd\nfine\n")
    options = {"src": [str(tmp_path / "x.txt")], "dst": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"x\.txt: line 3 column 'text'"):
        prepare(PrepareOptions(**options))  # type: ignore[arg-type]
    prepare(PrepareOptions(**options, max_bad=1))  # type: ignore[arg-type]
    assert read(tmp_path / "set").to_pydict() == {"text": ["good", "fine"]}


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, {}, "matches no file"),
        ({"a.csv": "a\n1\n", "b.txt": "x"}, {}, r"several formats: .*a\.csv \(csv\), .*b\.txt \(text\); set format="),
        ({"a.parquet": "x"}, {}, "is no Parquet file"),
        ({"a.arrow": "x"}, {}, "is no Arrow file"),
        ({"a.npy": "x"}, {}, r"is no \.npy file"),
        ({"a.tar": "x"}, {}, "is no whole tar file"),
        ({"a.jsonl": "x\n"}, {}, "begins without one JSON object a line"),
        ({"a.jsonl": '{"a": {"b": 1}, "c": 1}\n'}, {}, r"column 'a': .* cannot train; choose columns=\[c\]"),
        ({"a.jsonl": '{"a": 1}\n', "b.jsonl": '{"a": "x"}\n'}, {}, "not of the same types"),
        ({"a.jsonl": '{"a": 1}\n'}, {"tokenizer": "bytes"}, "set text= to one of a"),
        ({"a.jsonl": '{"a": 1}\n'}, {"tokenizer": "bytes", "text": "a"}, "text=a is a column of int64"),
        ({"a.txt": "\n"}, {}, "src gives no dataset sample"),
        ({"a.txt": "ab\ncd\n"}, {"tokenizer": "bytes", "pack": 99, "validation": 0.5}, "no train block of 100 tokens"),
        ({"a.bin": "x"}, {"format": "images"}, "holds no image"),
        ({"a.bin": "x"}, {"format": "hf"}, r"no state\.json"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line_and_leaves_nothing(
    tmp_path: Path, files: dict[str, str], options: dict[str, Any], said: str
) -> None:
    (tmp_path / "source").mkdir()
    for name, content in files.items():
        (tmp_path / "source" / name).write_text(content)
    with pytest.raises(DataError, match=said) as caught:
        prepare(PrepareOptions(src=[str(tmp_path / "source")], dst=str(tmp_path / "set"), **options))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["source"]


def test_rows_that_do_not_fit_the_first_are_bad(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"n": n} for n in range(2000))
        yield {"m": 1}
        yield {"n": "SECRET"}
        yield {"n": 2000}

    with pytest.raises(DataError, match="row 2001 has no column 'n': 2 bad so far, max_bad=0"):
        prepare_rows(rows, str(tmp_path / "set"))
    prepare_rows(rows, str(tmp_path / "set"), max_bad=2)
    assert read(tmp_path / "set")["n"].to_pylist() == list(range(2001))
    assert "SECRET" not in (tmp_path / "set" / "bad.jsonl").read_text()
    bad = (tmp_path / "set" / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in bad] == ["the rows: row 2001", "the rows: row 2002"]
