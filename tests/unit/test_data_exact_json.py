"""JSON as Python reads it: each value comes out as it went in, or its line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.dataset.readers import json_array, json_files
from everstep.dataset.readers import text as lines
from everstep.errors import DataError
from support.preparation import Outcome, outcome

WHOLE = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**53) - 1, -(2**63), 10**30]),
)
FLOATS = st.one_of(st.floats(), st.sampled_from([0.5, -0.0, 1.0, 2.0**53, 1e300, 5e-324, 0.1]))
TEXTS = st.one_of(st.text(max_size=4), st.sampled_from(["1", "007", "2020-01-01", "null", "\ud800", "a\u2028b", "\0"]))
LISTS = st.one_of(st.lists(WHOLE, max_size=3), st.lists(FLOATS, max_size=3), st.lists(WHOLE | FLOATS, max_size=3))
KINDS = st.sampled_from([WHOLE, FLOATS, TEXTS, st.booleans(), LISTS, WHOLE | FLOATS, WHOLE | TEXTS | st.none()])


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows in which columns have mostly one kind, come late, or are not there."""
    kinds = {name: draw(KINDS) for name in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))}
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        names = draw(st.sampled_from([list(kinds), list(kinds), list(kinds)[:1]]))
        rows.append({name: draw(kinds[name]) for name in names})
    return rows


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool) or isinstance(one, str):
        return type(one) is type(other) and one == other
    return bool(one == other or (one != one and other != other))


def number(place: str, content: bytes) -> int:
    """The number of the line or element that a place names; a line that begins no block is named by its byte."""
    what, count = place.rsplit(" ", 2)[1:]
    return int(count) if what != "byte" else content[: int(count)].count(b"\n") + 1


def assert_exact(given: list[Any], found: Outcome, content: bytes = b"") -> None:
    """Every row is there with equal values, or its number is among those that are named."""
    named = {number(place, content) for place in found.places}
    kept = [row for number, row in enumerate(given, 1) if number not in named]
    assert len(found.rows) == len(kept)
    for row, came in zip(kept, found.rows, strict=True):
        assert set(row) == set(came)
        assert all(same(row[name], came[name]) for name in row), (row, came)


@settings(max_examples=300)
@given(
    tables(), st.sampled_from([20, 100, 8 << 20]), st.sampled_from([10, 30, 1 << 20]), st.sampled_from(["", "\ufeff"])
)
def test_lines_come_out_as_python_reads_them_or_are_named(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], block: int, unit: int, mark: str
) -> None:
    folder = tmp_path_factory.mktemp("json")
    content = (mark + "\n".join(map(json.dumps, rows)) + "\n" * (block < unit)).encode()
    (folder / "a.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        patch.setattr(json_files, "BLOCK", block)
        found = outcome(folder / "a.jsonl", shard_mib=unit / 2**20)
    assert_exact(rows, found, content)


@settings(max_examples=200)
@given(
    tables(),
    st.sampled_from([1, 3, 1 << 20]),
    st.sampled_from([None, 2]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_the_elements_of_an_array_come_out_as_python_reads_them_or_are_named(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], block: int, indent: int | None, encoding: str
) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.JSON").write_text(json.dumps(rows, indent=indent), encoding=encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK", block)
        found = outcome(folder / "a.JSON")
    assert_exact(rows, found)


@pytest.mark.parametrize(
    ("text", "rows", "named"),
    [
        ('{"x": 1}\n{"x": 0.5}\nno json\n{"x": 2.75}\n', [1.0, 0.5, 2.75], ["line 3"]),
        ('{"x": [1, 2]}\n{"x": [0.25]}\n', [[1.0, 2.0], [0.25]], []),
        ('{"x": 9007199254740993}\n{"x": 18446744073709551615}\n', [2**53 + 1, 2**64 - 1], []),
        ('{"x": 9007199254740993}\n{"x": 0.5}\n', [0.5], ["line 1"]),
        ('{"x": [9007199254740993, 0.5]}\n{"x": [1]}\n', [[1.0]], ["line 1"]),
        ('{"x": 1}\n{"x": true}\n{"x": 2}\n', [1, 2], ["line 2"]),
        ('{"x": "1"}\n{"x": 2}\n{"x": "3"}\n', ["1", "3"], ["line 2"]),
        ('{"x": 1, "x": 2}\n{"x": 3}\n', [3], ["line 1"]),
        ('{"x": 1}\nnull\n{"x": 3}\n[1]\n', [1, 3], ["line 2", "line 4"]),
        ('{"x": 1}\n\n  \n{"x": 3}\r\n', [1, 3], []),
        ('{"x": "2020-01-01"}\n', ["2020-01-01"], []),
        ('{"x": 1e400}\n{"x": 1.5}\n', [float("inf"), 1.5], []),
        ("[1]\n" + '{"x": 1}\n', [1], ["line 1"]),
        ('[{"x": 1},\n {"x": 2.5}]', [1.0, 2.5], []),
        ('[{"x": 1}, [2], {"x": 3, "x": 3}]\n', [1], ["element 2", "element 3"]),
        ('[{"x": 1}, {"x": 2}', [1, 2], ["after row 2"]),
        ('[{"x": 1}, {"x": oops}, {"x": 3}]', [1], ["after row 1"]),
        ('[{"x": 1}] {"x": 2}', [1], ["after row 1"]),
        ('\ufeff{"x": 1}\n', [1], []),
        ('\ufeff [{"x": 1}]\n', [1], []),
    ],
)  # fmt: skip
def test_what_other_readers_change_without_a_word(tmp_path: Path, text: str, rows: list[Any], named: list[str]) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = outcome(tmp_path / "a.json")
    assert [row["x"] for row in found.rows] == rows
    assert [place.split("a.json: ")[-1].split("a.json ")[-1] for place in found.places] == named


def test_types_are_told_from_what_lies_megabytes_behind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n' * 1_200_000 + '{"x": 1.5}\n')
    assert outcome(tmp_path / "a.jsonl").column("x")[[0, -2, -1]].tolist() == [1.0, 1.0, 1.5]


def test_a_late_column_is_a_column_and_rows_without_it_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n' * 5 + '{"t": "b", "label": 1}\n')
    found = outcome(tmp_path / "a.jsonl")
    assert found.rows == [{"t": "b", "label": 1}]
    assert len(found.places) == 5
    assert outcome(tmp_path / "a.jsonl", columns=["t"]).rows == [{"t": "a"}] * 5 + [{"t": "b"}]


def test_of_a_source_too_large_to_look_at_the_rest_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_files, __import__("everstep.dataset.readers.base", fromlist=["source"])):
        monkeypatch.setattr(module, "LOOK_BYTES", 1000)
    monkeypatch.setattr(json_files, "BLOCK", 500)
    texts = [f'{{"x": {n}}}' for n in range(2000)]
    texts[777], texts[888], texts[999] = '{"x": 0.5}', '{"x": 9, "late": 1}', '{"x": "text"}'
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    found = outcome(tmp_path / "a.jsonl")
    assert found.column("x").tolist() == [n for n in range(2000) if n not in (777, 888, 999)]
    assert {int(place.rsplit(" ", 1)[1]) for place in found.places} == {778, 889, 1000}
    with pytest.raises(DataError, match="max_bad=0"):
        outcome(tmp_path / "a.jsonl", max_bad=0)


def test_numbers_of_several_files_are_held_by_one_type(tmp_path: Path) -> None:
    for name, text in (("a", '{"x": 1}'), ("b", '{"x": 9007199254740993}'), ("c", '{"x": 0.5}')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = outcome(tmp_path)
    assert [row["x"] for row in found.rows] == [1.0, 0.5]
    assert found.places == [f"{tmp_path}/b.jsonl: line 1"]
    assert found.column("x").dtype == np.float64
