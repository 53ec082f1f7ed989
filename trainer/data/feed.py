"""Feed of a run: the batches of one rank from any step on, with the current microbatch size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from everstep.config import LoaderConfig
from everstep.trainer.data.fetcher import Gather, Microbatch
from everstep.trainer.data.loader import Loader
from everstep.trainer.data.order import SampleOrder


class Feed:
    """Opens a loader at a step, after closing the previous one."""

    def __init__(
        self,
        gather: Gather,
        order: SampleOrder,
        loader: LoaderConfig,
        micro_batch: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.gather = gather
        self.order = order
        self.loader = loader
        self.micro_batch = micro_batch
        """Samples that this rank passes through the model at once, from the next call of `steps` on."""
        self.rank = rank
        self.world = world
        self.device = device
        self._open: Loader | None = None
        self._waited_s = 0.0

    def steps(self, done: int) -> Iterator[list[Microbatch]]:
        """Yield the local microbatches of each step after the first `done`."""
        self.close()
        self._open = Loader(
            self.gather,
            self.order,
            self.micro_batch,
            self.rank,
            self.world,
            self.device,
            prefetch=self.loader.prefetch,
            workers=self.loader.workers,
            worker=self.loader.worker,
            ahead_mb=self.loader.ahead_mb,
        )
        return self._open.steps(done)

    @property
    def wait_s(self) -> float:
        """Seconds that training has waited for data so far."""
        return self._waited_s + (self._open.wait_s if self._open is not None else 0.0)

    def close(self) -> None:
        if self._open is not None:
            self._waited_s += self._open.wait_s
            self._open.close()
            self._open = None
