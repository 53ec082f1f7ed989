"""CSV and TSV as Python reads them: each cell comes out as it went in, or its row is named."""

from __future__ import annotations

import csv as python_csv
import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from everstep.dataset.readers import csv
from everstep.errors import DataError
from support.preparation import outcome

NUMBERS = st.one_of(
    st.integers(-9, 9).map(str), st.floats().map(repr),
    st.sampled_from(["007", "+1", "0x10", "1e5", ".5", "5.", "1e400", " 1", "-0", "9007199254740993",
                     "18446744073709551615", "18446744073709551616",
                     "-9223372036854775808", "nan", "inf", "-Infinity", "1_000", "01.5", "00", "-"]),
)  # fmt: skip
WORDS = st.one_of(
    st.text(st.sampled_from('a",\n\r\tä \0'), max_size=5),
    st.sampled_from(["NA", "null", "", "true", "False", "2019-01-05", "12:30", "1,5", "12A",
                     "\x02everstep end of file\x03"]),
)  # fmt: skip
CELLS = st.sampled_from(
    [NUMBERS, st.integers(-9, 9).map(str), WORDS, st.sampled_from(["true", "false"]), NUMBERS | WORDS]
)


def same(text: str, value: Any) -> bool:
    """True if a value is the number, truth or text that a cell denotes."""
    if isinstance(value, str):
        return text == value
    if isinstance(value, bool):
        return text.strip().lower() == str(value).lower()
    if isinstance(value, int):
        return re.fullmatch(r"-?(0|[1-9]\d*)", text.strip(" \t")) is not None and int(text) == value
    return bool(float(text) == value or (value != value and "nan" in text.lower())) and not re.match(
        r"\s*(0\d|\+)", text
    )


@st.composite
def rows(draw: st.DrawFn) -> list[list[str]]:
    kinds = draw(st.lists(CELLS, min_size=1, max_size=3))
    return [[draw(kind) for kind in kinds] for _ in range(draw(st.integers(1, 8)))]


@settings(max_examples=500)
@given(
    rows(),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(0, 30),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_cells_come_out_as_python_reads_them_or_are_named(
    tmp_path_factory: pytest.TempPathFactory,
    given_rows: list[list[str]],
    end: str,
    block: int,
    tabs: bool,
    encoding: str,
) -> None:
    delimiter, path = ("\t", "a.TSV") if tabs else (",", "a.csv")
    sink = io.StringIO()
    writer = python_csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=python_csv.QUOTE_MINIMAL)
    names = list("abc"[: len(given_rows[0])])
    writer.writerows([names, *given_rows])
    text = sink.getvalue()
    given_rows = [row for row in list(python_csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))[1:] if row]
    assume(given_rows)
    file = tmp_path_factory.mktemp("csv") / path
    file.write_bytes(text.encode(encoding))
    longest = max(len(delimiter.join(row).encode()) + 4 * len(row) + text.count('"') for row in [names, *given_rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv, "BLOCK", longest + block)
        found = outcome(file)
    named = {int(place.rsplit("row ", 1)[1]) for place in found.places}
    kept = [row for number, row in enumerate(given_rows, 1) if number not in named]
    assert len(kept) == found.table.num_rows
    for row, came in zip(kept, found.rows, strict=True):
        assert all(same(text, came[name]) for name, text in zip(names, row, strict=True)), (row, came)
    whole = all(len(row) == len(names) for row in given_rows)
    assert not (named and whole) or any(field.type != pa.large_string() for field in found.table.schema)


def typed(tmp_path: Path, *cells: str) -> Any:
    (tmp_path / "a.csv").write_text("x\n" + "\n".join(cells) + "\n")
    return outcome(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "2"], [1, 2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["007", "12"], ["007", "12"]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        (["18446744073709551615", "0"], [2**64 - 1, 0]),
        (["18446744073709551615", "-1"], ["18446744073709551615", "-1"]),
        (["18446744073709551616", "1"], ["18446744073709551616", "1"]),
        (["2019-01-05", "2019-01-06"], ["2019-01-05", "2019-01-06"]),
        (["2019-01-05T00:00:00+02:00"], ["2019-01-05T00:00:00+02:00"]),
        (["NA", "DE"], ["NA", "DE"]),
        (["true", "False"], [True, False]),
        (["true", "1"], ["true", "1"]),
        (["1e400", "1"], ["1e400", "1"]),
        (["0x10", "1"], ["0x10", "1"]),
        (["1", "12A"], ["1", "12A"]),
        (["nan", "1"], [float("nan"), 1.0]),
    ],
)  # fmt: skip
def test_a_column_is_of_numbers_only_where_each_cell_is_one(
    tmp_path: Path, cells: list[str], values: list[Any]
) -> None:
    found = typed(tmp_path, *cells)
    assert repr([row["x"] for row in found.rows]) == repr(values)
    assert found.places == []


def test_types_are_told_from_what_lies_megabytes_behind(tmp_path: Path) -> None:
    assert typed(tmp_path, *["1"] * 1_000_000, "0.5").column("x")[[0, -1]].tolist() == [1.0, 0.5]
    assert typed(tmp_path, *["1"] * 1_000_000, "007").rows[-1] == {"x": "007"}
    stray = typed(tmp_path, *["1"] * 1_000_000, "abc")
    assert stray.table.num_rows == 1_000_000
    assert stray.places == [f"{tmp_path}/a.csv: row 1000001"]


def test_empty_cells_of_a_column_of_numbers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,a\n,b\nNA,c\n2,\n")
    found = outcome(tmp_path / "a.csv")
    assert found.rows == [{"x": 1, "y": "a"}, {"x": 2, "y": ""}]
    assert [place[-5:] for place in found.places] == ["row 2", "row 3"]


def test_a_crlf_in_quotes_over_the_border_of_a_block_is_kept(tmp_path: Path) -> None:
    head = b'id,s,p\n0,"'
    (tmp_path / "a.csv").write_bytes(head + b"z" * ((8 << 20) - len(head) - 2) + b'A\r\nB",x\n1,plain,x\n')
    assert outcome(tmp_path / "a.csv").table["s"][0].as_py().endswith("zA\r\nB")


@pytest.mark.parametrize(("last", "named"), [('3,"x', ["row 3"]), ('3,5" pipe', []), ('3,"x"', []), ('3,"a"b', [])])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_quote_that_is_never_closed_is_named(tmp_path: Path, last: str, named: list[str], end: str) -> None:
    (tmp_path / "a.csv").write_text(f"n,s\n1,a\n2,b\n{last}{end}")
    found = outcome(tmp_path / "a.csv")
    assert [place[-5:] for place in found.places] == named
    assert [row["n"] for row in found.rows] == [1, 2] + [3] * (not named)


def test_an_empty_file_among_others_gives_no_rows_and_a_header_alone_neither(tmp_path: Path) -> None:
    for name, text in (("a", ""), ("b", "x,y"), ("c", "x,y\n"), ("d", "y,x\n1,2\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    assert outcome(tmp_path).rows == [{"x": 2, "y": 1}]


def test_the_ending_of_a_file_decides_and_not_its_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tsv.d").mkdir()
    (tmp_path / "x.tsv.d" / "part.csv").write_text("a,b\n1,2\n")
    assert outcome(tmp_path / "x.tsv.d").rows == [{"a": 1, "b": 2}]


def test_columns_that_some_files_lack_are_refused_unless_others_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,s\n1,z\n")
    (tmp_path / "b.csv").write_text("n,t\n2,z\n")
    with pytest.raises(DataError, match=r"b\.csv and .*a\.csv differ in columns s, t; choose columns="):
        outcome(tmp_path)
    assert outcome(tmp_path, columns=["n"]).rows == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b,a\n1,2,3\n", "has the column 'a' twice"),
        ("ä,b\n1,2\n".encode("latin-1"), "is not UTF-8"),
        ("ä,b\n".encode("latin-1") + b"1,2\n" * (csv.BLOCK // 4), "is not UTF-8"),
        (b"", "is empty"),
    ],
)
def test_a_header_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=said):
        outcome(tmp_path)
