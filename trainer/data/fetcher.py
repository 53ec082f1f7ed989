"""Fetch of microbatches: from sample ids to tensors, gathered, decoded, collated and augmented.

Samples that are excluded or skipped are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from everstep.config import BadSample
from everstep.errors import DataError
from everstep.trainer.data.columns import BadSamples, Columns, Ragged
from everstep.trainer.data.dataset import Augment, BatchedReads, Collate, Dataset, Decode, location_of, take_seeded
from everstep.trainer.data.ordering.exclusion import Exclusion
from everstep.trainer.data.ordering.order import Ids, sample_keys
from everstep.trainer.data.ordering.permutation import Words
from everstep.trainer.data.randomness import Randomness, batch_key, draws
from everstep.trainer.data.workers import Workers

STAND_INS = 1000
"""Samples that are tried as replacement for a microbatch with no usable sample."""
REPEATED = 8
"""Samples that are read twice at the start of a run, to check that only their keys determine them."""
_STAGES = {"decode": 1 << 61, "collate": 1 << 62, "augment": 1 << 63}


class MicrobatchRequest(NamedTuple):
    """The samples of one slot, and the epoch in which each is visited."""

    ids: Ids
    epochs: Ids
    step: int
    """The step that uses them, as the log counts steps: the first is 1."""
    index: int = 0  # type: ignore[assignment]  # the field hides tuple.index, as in Slot
    """Number of the microbatch in the global batch."""
    real: bool = True
    """False if it repeats another rank's microbatch, to be passed with weight zero."""

    def only(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> MicrobatchRequest:
        """Return the request with only these rows."""
        return self._replace(ids=self.ids[rows], epochs=self.epochs[rows])


class Cut(NamedTuple):
    """Step and microbatch of one request of a span."""

    step: int
    """Step, counted from the span's first."""
    index: int  # type: ignore[assignment]
    real: bool


class RequestSpan(NamedTuple):
    """The requests of one rank for several steps, end to end."""

    first_step: int
    """The first step, as the log counts steps."""
    ids: Ids
    epochs: Ids
    bounds: Sequence[int]
    """Start of each request, and the end of the last one."""
    cuts: Sequence[Cut]

    def requests(self) -> Iterator[MicrobatchRequest]:
        for (start, stop), (step, index, real) in zip(pairwise(self.bounds), self.cuts, strict=True):
            yield MicrobatchRequest(self.ids[start:stop], self.epochs[start:stop], self.first_step + step, index, real)


@dataclass(slots=True)
class Microbatch:
    """A batch that one rank passes through the model at once."""

    index: int
    """Its number in the global batch."""
    real: bool
    """False: passed with weight zero, so that collectives match on ranks without a microbatch."""
    ids: Ids
    batch: dict[str, Tensor]
    """Named columns; row i is sample `ids[i]`."""
    skipped: Sequence[str] = ()
    """Location and reason of samples that do not decode and were left out."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches the samples of requests; the workers run it.

    Which samples are left out, excluded or undecodable, depends on the samples alone, so it is the same for every world
    size. Around code that may draw random numbers every generator is seeded by the samples and restored afterwards:
    trainer/data/randomness.py.
    """

    dataset: Dataset
    seed: int
    decode: Decode | None = None
    collate: Collate | None = None
    augment: Augment | None = None
    on_bad: BadSample = BadSample.stop
    excluded: Exclusion = field(default_factory=Exclusion)
    workers: int = 0
    """Processes that run users' code; if there are any, the trainer's own process never runs it.

    A file that a dataset opens at its first read would be shared by all workers forked later, which would then read at
    each other's offsets.
    """

    @cached_property
    def apart(self) -> bool:
        """True if each call from the trainer's own process must be made in another process."""
        return self.workers > 0 and self.draws

    @cached_property
    def draws(self) -> bool:
        """True if any part may draw from a generator of the process, so that it must not run beside the step."""
        return any(draws(part) for part in (self.dataset, self.decode, self.collate, self.augment))

    def __call__(self, request: MicrobatchRequest) -> Microbatch:
        if self.apart and get_worker_info() is None:
            [microbatch] = self.each([request])
            return microbatch
        return self._alone(self._kept(request), None)

    def each(self, requests: Sequence[MicrobatchRequest]) -> Iterator[Microbatch]:
        """Yield the microbatch of each request in turn, fetched by workers if there are any."""
        if not self.apart:
            yield from map(self, requests)
            return
        count = min(self.workers, len(requests))
        workers = Workers(self, requests, count, 2 * count)
        try:
            yield from workers
        finally:
            workers.close()

    def check_repeats(self) -> None:
        """Check that reading the first samples twice gives the same.

        Raises:
            DataError: they differ, so something other than their keys determines them.
        """
        if not self.draws:
            return
        ids = np.arange(min(REPEATED, len(self.dataset)))
        request = MicrobatchRequest(ids, np.zeros_like(ids), 1)
        try:
            reader = replace(self, workers=min(1, self.workers))
            first, again = (microbatch.batch for microbatch in reader.each([request] * 2))
        except DataError:
            return  # a sample that cannot be read is reported at its position in the order
        for name, column in first.items():
            if not _is_same(column, again[name]):
                raise DataError(
                    f"data: column {name!r} of samples 0 to {len(ids) - 1} differs each time that it is read: a clock, "
                    "the system or a generator that cannot be found decides; draw from torch's, NumPy's or Python's "
                    "global generator, or from one that the dataset holds as an attribute"
                )

    def together(self, dataset: BatchedReads, span: RequestSpan) -> Iterator[Microbatch]:
        """Yield the microbatches of a span, which `dataset` reads at once.

        If that fails, each request is gathered on its own, so that the error is raised at its position.
        """
        if self.excluded:
            return map(self, span.requests())
        try:
            found = dataset.take_batches(span.ids, span.bounds)
        except DataError:
            return map(self, span.requests())
        if self.decode is None and self.collate is None and self.augment is None:
            # Small batches take a few microseconds each, so nothing else may be done per batch.
            return (
                Microbatch(cut.index, cut.real, span.ids[start:stop], _tensors(columns))
                for (start, stop), cut, columns in zip(pairwise(span.bounds), span.cuts, found, strict=True)
            )
        return map(self._alone, span.requests(), found)

    def _kept(self, request: MicrobatchRequest) -> MicrobatchRequest:
        keep = self.excluded.kept(request.ids, request.step)
        return request if keep is None else request.only(keep)

    def _alone(self, request: MicrobatchRequest, columns: Columns | None) -> Microbatch:
        if not self.draws:
            return self._finished(request, columns, None)
        randomness = Randomness(self.dataset, self.decode, self.collate, self.augment)
        with randomness.kept():
            return self._finished(request, columns, randomness)

    def _finished(
        self, request: MicrobatchRequest, columns: Columns | None, randomness: Randomness | None
    ) -> Microbatch:
        skipped: list[str] = []
        while request.ids.size:
            try:
                batch = self._batch(request, columns, randomness)
                return Microbatch(request.index, request.real, request.ids, batch, skipped)
            except BadSamples as bad:
                told = [f"{location_of(self.dataset, int(request.ids[row]))}: {why}" for row, why in bad.errors.items()]
                if self.on_bad is BadSample.stop:
                    raise DataError(
                        f"{len(told)} samples cannot be decoded, the first is {told[0]}; mend it, or leave such "
                        "samples out with bad_samples=skip"
                    ) from bad
                skipped += told
                good = np.delete(np.arange(len(request.ids)), list(bad.errors))
                request, columns = request.only(good), None
        stand_in = self._stand_in(request, randomness)
        batch = self._batch(stand_in, None, randomness)
        return Microbatch(request.index, False, stand_in.ids, batch, skipped)

    def _batch(
        self, request: MicrobatchRequest, columns: Columns | None, randomness: Randomness | None
    ) -> dict[str, Tensor]:
        keys = sample_keys(self.seed, request.epochs, request.ids) if self.augment is not None or randomness else None
        if columns is None:
            columns = self._take(request.ids, keys, randomness)
        if self.decode is not None:
            _seed(randomness, keys, "decode")
            columns = self.decode(columns)
        if self.collate is not None:
            _seed(randomness, keys, "collate")
            columns = {**self.collate(columns)}
        tensors = _tensors(columns)
        if self.augment is not None and keys is not None:
            _check_rows(tensors, len(request.ids))
            _seed(randomness, keys, "augment")
            tensors = _tensors(self.augment(tensors, keys))
        return tensors

    def _take(self, ids: Ids, keys: Words | None, randomness: Randomness | None) -> Columns:
        if randomness is None or keys is None:
            return self.dataset.take(ids)
        return take_seeded(self.dataset, ids, keys, randomness.seed)

    def _stand_in(self, request: MicrobatchRequest, randomness: Randomness | None) -> MicrobatchRequest:
        """Return any sample that is neither excluded nor bad, since collectives need a pass on every rank."""
        for sample in range(min(STAND_INS, len(self.dataset))):
            one = self._kept(MicrobatchRequest(np.array([sample]), np.array([0]), request.step))
            try:
                if one.ids.size:
                    self._batch(one, None, randomness)
                    return one
            except BadSamples:
                continue
        raise DataError(f"the first {STAND_INS} samples are all excluded or cannot be decoded; check the dataset")


def _seed(randomness: Randomness | None, keys: Words | None, stage: str) -> None:
    if randomness is not None and keys is not None:
        randomness.seed(batch_key(keys) ^ _STAGES[stage])


def _check_rows(batch: Mapping[str, Tensor], samples: int) -> None:
    for name, column in batch.items():
        if len(column) != samples:
            raise DataError(
                f"augment wants a row of {name!r} for each sample, and collate made {len(column)} rows of "
                f"{samples} samples; augment in collate, or leave one of them out"
            )


def _tensors(columns: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, column in columns.items():
        if isinstance(column, Ragged):
            raise DataError(
                f"the samples of column {name!r} differ in length: give data.collate (everstep.data.Pad, Bucket or "
                "Pack), data.decode or a collate_fn, or choose other columns with data.columns"
            )
        if not isinstance(column, Tensor):
            raise DataError(
                f"column {name!r} of a batch is a {type(column).__name__}, not a tensor: make it one in the dataset, "
                "in data.collate or in a collate_fn"
            )
    return columns  # type: ignore[return-value]


def _is_same(first: Tensor, again: Tensor) -> bool:
    if first.dtype != again.dtype or first.shape != again.shape:
        return False
    return bool(((first == again) | ((first != first) & (again != again))).all())
