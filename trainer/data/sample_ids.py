"""data.json in the run folder: the sources of the run's sample ids.

With it any step can be traced without the data.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.errors import DataError
from everstep.run_folder import DATA, RunFolder
from everstep.trainer.data.order import SampleOrder, Source


@dataclass(frozen=True)
class DataRecord:
    """One source of a run's samples."""

    place: str
    """Path or URL, or the class of the dataset."""
    digest: str
    share: str
    """Share of all samples that the run uses, as a fraction."""
    rows: Sequence[int]
    """Samples of each shard."""
    files: Sequence[str] = ()
    """Name of each shard, if there are files."""
    weights: str | None = None
    """Weight of each sample: float64, deflated, base64; None if each comes once per epoch."""


def read_record(folder: RunFolder) -> list[DataRecord]:
    """Return the sources of a run.

    Raises:
        DataError: the run has not recorded them, or the record is damaged.
    """
    try:
        document = json.loads(folder.storage.read(DATA))
        return [DataRecord(**source) for source in document["sources"]]
    except FileNotFoundError:
        raise DataError(f"{folder.url} has no {DATA}: it is no run folder, or its run never began to train") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.url}/{DATA} is damaged ({error!r}); start the run again to write it anew") from error


def write_record(folder: RunFolder, sources: Sequence[DataRecord]) -> None:
    """Write the record of the sources, unless the same is already there."""
    document: dict[str, Any] = {"sources": [asdict(source) for source in sources]}
    text = (json.dumps(document) + "\n").encode()
    if not folder.storage.create(DATA, text) and folder.storage.read(DATA) != text:
        folder.storage.write(DATA, text)


def order_sources(records: Sequence[DataRecord]) -> list[Source]:
    return [Source(record.rows, Fraction(record.share), unpacked(record.weights)) for record in records]


def packed(weights: NDArray[np.float64] | None) -> str | None:
    return None if weights is None else base64.b64encode(zlib.compress(weights.tobytes(), 1)).decode()


def unpacked(text: str | None) -> NDArray[np.float64] | None:
    return None if text is None else np.frombuffer(zlib.decompress(base64.b64decode(text)))


class Places:
    """Conversion from a sample's id to source, shard and row, and back."""

    def __init__(self, records: Sequence[DataRecord], order: SampleOrder) -> None:
        self._records = records
        self._starts = order.starts
        self._shards = [np.cumsum([0, *record.rows]) for record in records]

    def of(self, sample: int) -> tuple[str, str, int]:
        """Return (source, shard or '', row) of a sample."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        record, local = self._records[number], sample - int(self._starts[number])
        if not record.files:
            return record.place, "", local
        shard = int(np.searchsorted(self._shards[number], local, side="right")) - 1
        return record.place, record.files[shard], local - int(self._shards[number][shard])

    def sample(self, file: str, row: int) -> int:
        """Return the id of row `row` of the shard `file`, which is a name or the end of a path.

        Raises:
            DataError: no shard or several match, or the row does not exist.
        """
        found = [
            (number, shard)
            for number, record in enumerate(self._records)
            for shard, name in enumerate(record.files)
            if file in (name, f"{record.place.rstrip('/')}/{name}")
        ]
        if len(found) != 1:
            raise DataError(f"{len(found)} shards of the run are called {file!r}; give a sample's id, or PATH/FILE:ROW")
        number, shard = found[0]
        rows = self._records[number].rows[shard]
        if not 0 <= row < rows:
            raise DataError(f"{file} has rows 0 to {rows - 1}, not {row}")
        return int(self._starts[number] + self._shards[number][shard] + row)
