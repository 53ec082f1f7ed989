"""Names of samples that a user gives: an id, FILE:ROW of a shard, or COLUMN=VALUE of the data itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.ordering.data_record import DataRecord
from everstep.trainer.data.ordering.trace import Trace

READ_TOGETHER = 1 << 14
"""Samples whose column is read at once."""


def sample_ids(trace: Trace, name: str, option: str = "--sample") -> list[int]:
    """Return the samples with a name, in ascending order.

    Raises:
        ConfigError: the name has none of the forms, or the run has no such sample.
        DataError: the shard or column does not exist, or the data is not that of the run.
    """
    column, equals, value = name.partition("=")
    file, _, row = name.rpartition(":")
    if name.isdecimal():
        found = [int(name)]
    elif file and row.isdecimal():
        found = [trace.places.sample(file, int(row))]
    elif equals:
        found = sorted(_with_value(trace, column, value))
    else:
        raise ConfigError(
            f"{option} {name!r} is neither an id nor FILE:ROW, such as shard-000003-000.arrow:17, nor COLUMN=VALUE"
        )
    if not found:
        raise ConfigError(f"{option} {name!r}: no sample of the run has this value")
    if found[-1] >= trace.order.samples:
        raise ConfigError(f"{option} {name}: the run has samples 0 to {trace.order.samples - 1}")
    return found


def listed(text: str) -> list[str]:
    """Return the names in a text: those of the file with this path, one a line, or a list with commas."""
    if Path(text).is_file():
        lines = Path(text).read_text().splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [word.strip() for word in text.split(",") if word.strip()]


def all_ids(trace: Trace, names: Iterable[str], option: str) -> list[int]:
    """Return the samples of several names, in ascending order, each once."""
    return sorted({sample for name in names for sample in sample_ids(trace, name, option)})


def _with_value(trace: Trace, column: str, value: str) -> Iterator[int]:
    """Yield the samples whose `column` is `value`; the datasets of the run must still be there."""
    has_column = False
    for record, start in zip(trace.places.records, trace.order.starts.tolist(), strict=False):
        rows = _rows_with(record, column, value)
        has_column = has_column or rows is not None
        yield from (start + row for row in rows or ())
    if not has_column:
        raise DataError(f"no dataset of the run has a column {column!r} of single values; give ids, or FILE:ROW")


def _rows_with(record: DataRecord, column: str, value: str) -> list[int] | None:
    """Return the rows of one source with this value; None if it has no such column."""
    if not record.files:
        return None
    from everstep.trainer.data.arrow_reader import ArrowDataset
    from everstep.trainer.data.columns import Ragged

    whole = ArrowDataset(record.place)
    if whole.digest != record.digest and record.weights is None:
        raise DataError(f"{record.place} is no longer the data of the run (digest {whole.digest[:12]})")
    described = whole.index.columns.get(column)
    if described is None or not (described.shape == () or described.type in ("str", "bytes")):
        return None
    dataset, found = ArrowDataset(record.place, columns=[column]), []
    for first in range(0, len(dataset), READ_TOGETHER):
        ids = np.arange(first, min(first + READ_TOGETHER, len(dataset)))
        values = dataset.take(ids)[column]
        if isinstance(values, Ragged):
            found += [first + row for row in range(len(values)) if values.bytes(row) == value.encode()]
        else:
            found += [first + row for row, each in enumerate(values.tolist()) if _is(each, value)]
    return found


def _is(found: float, value: str) -> bool:
    """Return whether a number, or a truth, is what a user wrote."""
    if isinstance(found, bool):
        return value.lower() == str(found).lower()
    try:
        return found == (int(value) if isinstance(found, int) else float(value))
    except ValueError:
        return False
