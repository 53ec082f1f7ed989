"""Types of the cells of a CSV file: numbers only if each cell is a canonical number, else text.

`007`, `+49`, `0x10` and numbers that no type holds could not be written back as they were, so their column is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from everstep.dataset.readers.type_inference import EXACT, HIGHEST, HIGHEST_UNSIGNED, LOWEST

BLANKS = " \t"
WHOLE = r"-?(?:0|[1-9][0-9]*)"
FLOAT = rf"{WHOLE}(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|-?\.[0-9]+(?:[eE][+-]?[0-9]+)?"
INFINITE = r"-?(?:inf|Inf|INF|Infinity)"
WORD = rf"-?(?:nan|NaN)|{INFINITE}"
BOOL = r"true|false|True|False|TRUE|FALSE"
CODE = r"[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\+\.[0-9]+(?:[eE][+-]?[0-9]+)?|0[xX][0-9a-fA-F]+"
"""Cells that look like a number and match none of the above."""
NULL = r"|NA|N/A|n/a|#NA|#N/A|NULL|null|None"
BEGINNINGS = r"[-+.#0-9tTfFnNiI]"
"""First characters of all of these."""
STRAYS = 1000
"""Ratio of numbers to other cells, above which a column has numbers and its other cells are bad."""
_WHOLE = re.compile(WHOLE)


def is_whole(text: str) -> bool:
    """True if a text is a canonical whole number that int64 holds."""
    return _WHOLE.fullmatch(text) is not None and LOWEST <= int(text) <= HIGHEST


@dataclass
class Cells:
    """Number of cells of each kind in a column."""

    wholes: int = 0
    floats: int = 0
    bools: int = 0
    codes: int = 0
    words: int = 0
    low: int = 0
    high: int = 0

    def add(self, other: Cells) -> None:
        """Add the counts of another part of the column."""
        for name in ("wholes", "floats", "bools", "codes", "words"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def kind(self) -> str | None:
        """The kind of nearly all cells; None if there are none, or several kinds."""
        numbers = self.wholes + self.floats
        if numbers > STRAYS * (self.words + self.bools):
            return "numbers"
        if self.bools > STRAYS * (self.words + numbers + self.codes):
            return "booleans"
        return "text" if self.words and not numbers else None

    @property
    def type(self) -> pa.DataType:
        """The type that holds the cells as they are written."""
        if self.kind == "booleans":
            return pa.bool_()
        if self.kind != "numbers" or self.codes:
            return pa.string()
        if self.floats:
            return pa.float64() if self.low >= -EXACT and self.high <= EXACT else pa.string()
        if self.low >= LOWEST and self.high <= HIGHEST:
            return pa.int64()
        return pa.uint64() if not self.low and self.high <= HIGHEST_UNSIGNED else pa.string()


def see(cells: pa.Array, found: Cells) -> None:
    """Count the cells of a column of bytes."""
    if found.words:  # the other cells are likely to be words too, so those that begin as a word are counted at once
        likely = _matches(cells, f"(?s:{BEGINNINGS}.*)|")
        found.words += len(cells) - _count(likely)
        cells = cells.filter(likely)
    whole = _matches(cells, WHOLE)
    wholes = _count(whole)
    if wholes:
        found.wholes += wholes
        low, high = _ends(_texts(cells if wholes == len(cells) else cells.filter(whole)))
        found.low, found.high = min(found.low, low), max(found.high, high)
    if wholes == len(cells):
        return
    rest = cells.filter(pc.invert(whole)) if wholes else cells
    floats = _matches(rest, f"{FLOAT}|{WORD}")
    texts = _texts(rest.filter(floats))
    infinite = _count(pc.is_inf(texts.cast(pa.float64())))
    large = infinite and infinite - _count(_matches(texts, INFINITE))  # beyond the range of a float
    found.floats += len(texts) - large
    rest = rest.filter(pc.invert(floats))
    bools, codes = _count(_matches(rest, BOOL)), _count(_matches(rest, CODE))
    found.bools += bools
    found.codes += codes + large
    found.words += len(rest) - codes - bools - _count(_matches(rest, NULL))


def _count(mask: pa.BooleanArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _ends(texts: pa.Array) -> tuple[int, int]:
    try:
        ends = pc.min_max(texts.cast(pa.int64())).as_py()
        return min(0, ends["min"]), max(0, ends["max"])
    except pa.ArrowInvalid:
        values = [int(text) for text in texts.to_pylist() if len(text) < 40] or [HIGHEST_UNSIGNED + 1]
        longest = HIGHEST_UNSIGNED + 1 if len(values) < len(texts) else 0
        return min(0, *values), max(0, longest, *values)


def _matches(cells: pa.Array, pattern: str) -> pa.BooleanArray:
    return pc.match_substring_regex(cells, rf"^[ \t]*(?:{pattern})[ \t]*$")


def _texts(cells: pa.Array) -> pa.Array:
    return pc.ascii_trim(cells.cast(pa.large_string()), BLANKS)


def typed(cells: pa.Array, kind: pa.DataType) -> tuple[pa.Array, pa.BooleanArray]:
    """Return cells of bytes as values of a type, and a mask of those that fit; `clean` decodes text."""
    if pa.types.is_string(kind):
        return cells, pa.repeat(True, len(cells))
    if pa.types.is_boolean(kind):
        fits = _matches(cells, BOOL)
    else:
        fits = _matches(cells, f"{FLOAT}|{WORD}" if pa.types.is_floating(kind) else WHOLE)
    texts = _texts(pc.if_else(fits, cells, pa.scalar(None, cells.type)))
    try:
        return texts.cast(kind), fits
    except pa.ArrowInvalid:  # beyond the type's range
        return _one_by_one(texts, kind)


def _one_by_one(texts: pa.Array, kind: pa.DataType) -> tuple[pa.Array, pa.BooleanArray]:
    low, high = (0, HIGHEST_UNSIGNED) if pa.types.is_unsigned_integer(kind) else (LOWEST, HIGHEST)
    values = [None if text is None or not low <= int(text) <= high else int(text) for text in texts.to_pylist()]
    return pa.array(values, kind), pa.array([value is not None for value in values])
