"""Record of a run's data in data.json of its folder: the sources that the order mixes, with digests."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.checked_json import mapping, parse, sequence, text, whole
from everstep.dataset.tags import checked_tags
from everstep.errors import DataError
from everstep.run_folder import DATA, RunFolder
from everstep.storage.base import LARGEST_READ
from everstep.trainer.data.ordering.order import OrderSource

LONGEST_PLACE = 1 << 16
"""Characters of a path, URL or name of a shard."""
FLOAT_BYTES = 8


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
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the dataset, such as its licence."""
    lengths: str | None = None
    """Length of each sample, written as weights are; None if the order does not depend on it."""


def read_record(folder: RunFolder) -> list[DataRecord]:
    """Return the sources of a run.

    Raises:
        DataError: the run has not recorded them, or the record is damaged.
    """
    try:
        document = mapping(parse(folder.storage.read(DATA)), "it")
        return [_data_record(source) for source in sequence(document["sources"], "sources")]
    except FileNotFoundError:
        raise DataError(f"{folder.url} has no {DATA}: it is no run folder, or its run never began to train") from None
    except (ValueError, KeyError, TypeError, ArithmeticError, zlib.error) as error:
        raise DataError(f"{folder.url}/{DATA} is damaged ({error!r}); start the run again to write it anew") from error


def _data_record(source: object) -> DataRecord:
    """Return a source; ValueError or TypeError unless `write_record` can have written it."""
    found = DataRecord(**mapping(source, "a source"))
    for name in ("place", "digest"):
        text(getattr(found, name), name, LONGEST_PLACE)
    if not Fraction(text(found.share, "share")) > 0:
        raise ValueError(f"share is {found.share}, not above 0")
    rows = sum(whole(count, "rows") for count in sequence(found.rows, "rows"))
    for file in sequence(found.files, "files"):
        text(file, "files", LONGEST_PLACE)
    if found.files and len(found.files) != len(found.rows):
        raise ValueError(f"{len(found.files)} files have {len(found.rows)} numbers of rows")
    for name in ("weights", "lengths"):
        numbers = getattr(found, name)
        if numbers is not None and len(_inflated(numbers, rows)) != rows * FLOAT_BYTES:
            raise ValueError(f"the {name} are not those of {rows} samples")
    checked_tags(found.tags)
    return found


def write_record(folder: RunFolder, sources: Sequence[DataRecord]) -> None:
    """Write the record of the sources, unless the same is already there."""
    document: dict[str, Any] = {"sources": [asdict(source) for source in sources]}
    text = (json.dumps(document) + "\n").encode()
    if not folder.storage.create(DATA, text) and folder.storage.read(DATA) != text:
        folder.storage.write(DATA, text)


def order_sources(records: Sequence[DataRecord]) -> list[OrderSource]:
    return [
        OrderSource(record.rows, Fraction(record.share), unpacked(record.weights), unpacked(record.lengths))
        for record in records
    ]


def packed(numbers: NDArray[np.float64] | None) -> str | None:
    return None if numbers is None else base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode()


def unpacked(text: str | None) -> NDArray[np.float64] | None:
    return None if text is None else np.frombuffer(zlib.decompress(base64.b64decode(text)))


def _inflated(packed: str, rows: int) -> bytes:
    """Return the bytes of packed numbers, at most one more than `rows` of them have."""
    return zlib.decompressobj().decompress(base64.b64decode(packed), min(rows * FLOAT_BYTES, LARGEST_READ) + 1)
