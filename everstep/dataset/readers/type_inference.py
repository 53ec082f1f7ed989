"""Types that hold all values of a column exactly, and checks of a value against a type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from everstep.errors import DataError

EXACT = 2**53
"""Every whole number up to this one is a float64; above, some are not."""
LOWEST, HIGHEST, HIGHEST_UNSIGNED = -(2**63), 2**63 - 1, 2**64 - 1
BOOL, NUMBER, TEXT, LIST, OBJECT = "booleans", "numbers", "text", "lists", "objects"


@dataclass
class Values:
    """Counts of one column's values by kind, and the range of whole numbers."""

    kinds: Counter[str] = field(default_factory=Counter)
    floats: int = 0
    low: int = 0
    high: int = 0
    inner: Values | None = None
    """The elements of lists."""

    @property
    def kind(self) -> str | None:
        """The kind of most values; None if all are null."""
        return self.kinds.most_common(1)[0][0] if self.kinds else None

    def see(self, value: Any) -> None:
        """Count a value as `json` reads it."""
        if value is None:
            return
        kind = _KINDS[type(value)]
        self.kinds[kind] += 1
        if kind == NUMBER:
            self._see_number(value)
        elif kind == LIST:
            self.inner = self.inner or Values()
            for element in value:
                self.inner.see(element)

    def _see_number(self, value: float) -> None:
        if isinstance(value, float):
            self.floats += 1
        elif LOWEST <= value <= HIGHEST_UNSIGNED:  # a number that no type holds is a bad value, and sets no type
            self.low, self.high = min(self.low, value), max(self.high, value)

    def see_column(self, column: pa.ChunkedArray | pa.Array) -> None:
        """Count a column as PyArrow reads it from JSON, without floats that may have been whole numbers."""
        kind, count = column.type, len(column) - column.null_count
        if not count:
            return
        if pa.types.is_list(kind):
            self.kinds[LIST] += count
            self.inner = self.inner or Values()
            self.inner.see_column(pc.list_flatten(column))
            return
        name = BOOL if pa.types.is_boolean(kind) else OBJECT if pa.types.is_struct(kind) else TEXT
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            name = NUMBER
            self.floats += count if pa.types.is_floating(kind) else 0
            if pa.types.is_integer(kind):
                ends = pc.min_max(column).as_py()
                self.low, self.high = min(self.low, ends["min"]), max(self.high, ends["max"])
        self.kinds[name] += count

    def add(self, other: Values) -> None:
        """Add the counts of another part of the column."""
        self.kinds.update(other.kinds)
        self.floats += other.floats
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.inner is not None:
            self.inner = self.inner or Values()
            self.inner.add(other.inner)

    @property
    def type(self) -> pa.DataType:
        """The type that holds most of the values; text for a column of nulls alone."""
        if self.kind == NUMBER:
            unsigned = self.high > HIGHEST and not self.low
            return pa.float64() if self.floats else pa.uint64() if unsigned else pa.int64()
        if self.kind == LIST:
            inner = self.inner.type if self.inner is not None and self.inner.kind else pa.int64()
            return pa.list_(inner)
        if self.kind == OBJECT:
            return pa.struct([])
        return pa.bool_() if self.kind == BOOL else pa.string()


_KINDS = {bool: BOOL, int: NUMBER, float: NUMBER, str: TEXT, list: LIST, dict: OBJECT}


def may_round(column: pa.ChunkedArray | pa.Array) -> bool:
    """True if floats are so large that whole numbers may have been rounded to them."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_floating(column.type):
        return False
    return bool(pc.any(pc.greater_equal(pc.abs(column), float(EXACT))).as_py())


def fits(value: Any, kind: pa.DataType) -> bool:
    """True if `kind` holds a value of Python's json exactly; null fits each kind."""
    if value is None:
        return True
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return isinstance(value, list) and all(fits(element, kind.value_type) for element in value)
    if pa.types.is_floating(kind):
        return type(value) is float or (type(value) is int and _is_float(value))
    if pa.types.is_integer(kind):
        low, high = (0, HIGHEST_UNSIGNED) if pa.types.is_unsigned_integer(kind) else (LOWEST, HIGHEST)
        return type(value) is int and low <= value <= high
    if pa.types.is_boolean(kind):
        return type(value) is bool
    return pa.types.is_string(kind) and isinstance(value, str) and _is_unicode(value)


def as_float(value: Any, kind: pa.DataType) -> Any:
    """Convert whole numbers in a value of a float type to floats: PyArrow accepts none above EXACT."""
    if pa.types.is_list(kind) and value is not None:
        return [as_float(element, kind.value_type) for element in value]
    return float(value) if pa.types.is_floating(kind) and value is not None else value


def _is_float(value: int) -> bool:
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


class Evidence(Protocol):
    """Counts of a column's values."""

    @property
    def kind(self) -> str | None: ...

    def add(self, other: Any) -> None: ...


E = TypeVar("E", bound=Evidence)


def in_all(found: Iterable[tuple[str, Mapping[str, E]]], make: Callable[[], E]) -> dict[str, E]:
    """Return the counts of all files' columns.

    Raises:
        DataError: a column has different kinds in two files.
    """
    together: dict[str, E] = {}
    first: dict[str, tuple[str, str]] = {}
    for url, columns in found:
        for name, seen in columns.items():
            kind, where = first.get(name, (seen.kind, url))
            if kind and seen.kind and kind != seen.kind:
                raise DataError(
                    f"the files' columns are not of the same types: {name!r} is {kind} in {where}, {seen.kind} in {url}"
                )
            if kind:
                first[name] = kind, where
            together.setdefault(name, make()).add(seen)
    return together
