"""Worker processes that fetch microbatches, in order, by torch's DataLoader."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from everstep.errors import EverstepError

Request = TypeVar("Request")
Result = TypeVar("Result")

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class Workers(Generic[Request, Result]):
    """Maps `work` over an endless iterator of requests in `count` processes; results keep the order.

    The signals that ask the trainer to save and stop reach its whole process group. The workers ignore them, since they
    must deliver until the trainer is done; they end with their parent.
    """

    def __init__(self, work: Callable[[Request], Result], requests: Iterable[Request], count: int, ahead: int) -> None:
        loader: DataLoader[Any] = DataLoader(
            _Work(work),
            batch_size=None,
            sampler=_Requests(requests),
            num_workers=count,
            prefetch_factor=max(2, -(-ahead // count)),
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # otherwise it would draw a seed from the step's own generator
        )
        # Until a worker has set its handlers, the mask that it inherits blocks the signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            self._results: Iterator[Result] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes = list(getattr(self._results, "_workers", ()))

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._results is None:
            raise StopIteration
        result = next(self._results)
        if isinstance(result, _Failed):
            raise result.error
        return result

    def close(self) -> None:
        """Stop the workers; one that does not stop within torch's 5 s is killed."""
        self._results = None
        for process in self._processes:
            if process.is_alive():
                process.kill()


@dataclass(frozen=True)
class _Failed:
    error: EverstepError


class _Work(TorchDataset[Any]):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._work(request)
        except EverstepError as error:
            return _Failed(error)  # torch would wrap its one-line message in a traceback


class _Requests(Sampler[Any]):
    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Any]:
        return iter(self._requests)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
