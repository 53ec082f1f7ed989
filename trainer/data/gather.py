"""From the ids of a microbatch to its tensors: gathered, decoded, collated, augmented, without the samples left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import BadSample
from trainer.data.bad import BadSamples
from trainer.data.columns import Columns
from trainer.data.dataset import Augment, Collate, Dataset, Decode, Takes, place_of
from trainer.data.exclusion import Exclusion
from trainer.data.order import Ids, sample_keys
from trainer.errors import DataError

STAND_INS = 1000
"""Samples that are tried for a microbatch of which nothing is left."""


class Request(NamedTuple):
    """The samples of one slot, and the epoch in which each is visited."""

    ids: Ids
    epochs: Ids
    step: int
    """The step that uses them, as the log counts steps: the first is 1."""
    index: int = 0  # type: ignore[assignment]  # the field's word hides tuple.index, as in Slot
    """Number of the microbatch in the global batch."""
    real: bool = True
    """False where it repeats another rank's, to be passed with weight zero."""

    def only(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Request:
        """The same with these rows of it."""
        return self._replace(ids=self.ids[rows], epochs=self.epochs[rows])


class Cut(NamedTuple):
    """What one request of a span is for."""

    step: int
    """Counted from the span's first."""
    index: int  # type: ignore[assignment]
    real: bool


class Span(NamedTuple):
    """The requests of one rank for several steps, end to end."""

    first_step: int
    """As the log counts steps."""
    ids: Ids
    epochs: Ids
    bounds: Sequence[int]
    """Where each request begins, and where the last one ends."""
    cuts: Sequence[Cut]

    def requests(self) -> Iterator[Request]:
        for (start, stop), (step, index, real) in zip(pairwise(self.bounds), self.cuts, strict=True):
            yield Request(self.ids[start:stop], self.epochs[start:stop], self.first_step + step, index, real)


@dataclass(slots=True)
class Microbatch:
    """What one rank passes through the model at once."""

    index: int
    """Its number in the global batch."""
    real: bool
    """False: passed with weight zero, so that collectives match on ranks with nothing left to do."""
    ids: Ids
    batch: dict[str, Tensor]
    """Named columns; row i is sample `ids[i]`."""
    skipped: Sequence[str] = ()
    """Place and reason of samples that do not decode and were left out."""


@dataclass(frozen=True)
class Gather:
    """Fetches the samples of requests; it is what workers run.

    What is left out, excluded or undecodable, depends on the samples alone, and so is the same on every world.
    """

    dataset: Dataset
    seed: int
    decode: Decode | None = None
    collate: Collate | None = None
    augment: Augment | None = None
    on_bad: BadSample = BadSample.stop
    excluded: Exclusion = field(default_factory=Exclusion)

    def __call__(self, request: Request) -> Microbatch:
        return self._finished(self._kept(request), None)

    def together(self, takes: Takes, span: Span) -> Iterator[Microbatch]:
        """All requests by the dataset's `takes`; what fails is gathered again alone, so that it fails at its place."""
        if self.excluded:
            return map(self, span.requests())
        try:
            found = takes(span.ids, span.bounds)
        except DataError:
            return map(self, span.requests())
        if self.decode is None and self.collate is None and self.augment is None:
            # Small batches are made in a few microseconds; nothing is done for each that was not asked for.
            return (
                Microbatch(cut.index, cut.real, span.ids[start:stop], _tensors(columns))
                for (start, stop), cut, columns in zip(pairwise(span.bounds), span.cuts, found, strict=True)
            )
        return map(self._finished, span.requests(), found)

    def _kept(self, request: Request) -> Request:
        keep = self.excluded.kept(request.ids, request.step)
        return request if keep is None else request.only(keep)

    def _finished(self, request: Request, columns: Columns | None) -> Microbatch:
        skipped: list[str] = []
        while request.ids.size:
            try:
                columns = self.dataset.take(request.ids) if columns is None else columns
                return Microbatch(request.index, request.real, request.ids, self._batch(request, columns), skipped)
            except BadSamples as bad:
                told = [f"{place_of(self.dataset, int(request.ids[row]))}: {why}" for row, why in bad.errors.items()]
                if self.on_bad is BadSample.stop:
                    raise DataError(
                        f"{len(told)} samples cannot be decoded, the first is {told[0]}; mend it, or leave such "
                        "samples out with bad_samples=skip"
                    ) from bad
                skipped += told
                good = np.delete(np.arange(len(request.ids)), list(bad.errors))
                request, columns = request.only(good), None
        stand_in = self._stand_in(request)
        batch = self._batch(stand_in, self.dataset.take(stand_in.ids))
        return Microbatch(request.index, False, stand_in.ids, batch, skipped)

    def _batch(self, request: Request, columns: Columns) -> dict[str, Tensor]:
        if self.decode is not None:
            columns = self.decode(columns)
        batch = self.collate(columns) if self.collate is not None else _tensors(columns)
        if self.augment is not None:
            for name, column in batch.items():
                if len(column) != len(request.ids):
                    raise DataError(
                        f"augment wants a row of {name!r} for each sample, and collate made {len(column)} rows of "
                        f"{len(request.ids)} samples; augment in collate, or leave one of them out"
                    )
            batch = self.augment(batch, sample_keys(self.seed, request.epochs, request.ids))
        return batch

    def _stand_in(self, request: Request) -> Request:
        """Any sample that is neither excluded nor bad: collectives need a pass also where there is nothing to learn."""
        for sample in range(min(STAND_INS, len(self.dataset))):
            one = self._kept(Request(np.array([sample]), np.array([0]), request.step))
            try:
                if one.ids.size:
                    self._batch(one, self.dataset.take(one.ids))
                    return one
            except BadSamples:
                continue
        raise DataError(f"the first {STAND_INS} samples are all excluded or cannot be decoded; check the dataset")


def _tensors(columns: Columns) -> dict[str, Tensor]:
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            raise DataError(
                f"the samples of column {name!r} differ in length: give data.collate (trainer.data.collate.Pad, "
                "Bucket or Pack) or data.decode, or choose other columns with data.columns"
            )
    return columns  # type: ignore[return-value]
