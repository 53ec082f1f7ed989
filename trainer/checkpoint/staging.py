"""Staging buffer: the copy of a rank's state that a save is written from while training continues."""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everstep.trainer.checkpoint.layout import Layout

LOG = logging.getLogger("everstep")
_PORTABLE = 1
"""Flag of cudaHostRegister: pinned for every GPU of this process."""


class Staging:
    """A buffer that is allocated once and used for every save; pinned if the device is a GPU.

    A copy into memory that was touched before runs at memory speed; into fresh pages it is five times slower. torch's
    own pinned memory would be up to twice as large, since it is allocated in powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False
        self._copied: torch.cuda.Event | None = None
        self._making: threading.Thread | None = None
        self._views: tuple[Layout | None, list[Tensor]] = (None, [])

    def make_room(self, size: int) -> None:
        """Allocate and touch `size` bytes in a background thread; `fill` waits for it."""
        self._making = threading.Thread(target=self._make, args=(size,), name="make room", daemon=True)
        self._making.start()

    def fill(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Copy this rank's pieces in; on a GPU the copies are queued before later changes of the tensors."""
        if self._making is not None:
            self._making.join()
        if len(self.buffer) < layout.bytes:
            self._make(layout.bytes)
        if self._views[0] is not layout:
            self._views = (layout, self._views_of(layout))
        if layout.pieces:
            torch._foreach_copy_(self._views[1], layout.local(tensors), non_blocking=True)
        if self.device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def bytes(self, size: int) -> memoryview:
        """Return the first `size` bytes, after waiting for the copies."""
        if self._copied is not None:
            self._copied.synchronize()
        return memoryview(self.buffer.numpy())[:size]  # type: ignore[arg-type]

    def _views_of(self, layout: Layout) -> list[Tensor]:
        return [
            self.buffer[piece.start : piece.start + piece.length].view(piece.dtype).view(piece.sizes)
            for piece in layout.pieces
        ]

    def _make(self, size: int) -> None:
        if self._is_pinned:  # must happen before its pages are freed
            _runtime().cudaHostUnregister(self.buffer.data_ptr())
            self._is_pinned = False
        if size:
            pages = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            self.buffer = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        if size and self.device.type == "cuda":
            self._pin()

    def _pin(self) -> None:
        """Pin the buffer, so that a GPU can write into it while it computes."""
        with torch.cuda.device(self.device):  # a new thread's device is GPU 0, where a context would take up memory
            code = int(_runtime().cudaHostRegister(self.buffer.data_ptr(), len(self.buffer), _PORTABLE))
        self._is_pinned = code == 0
        if not self._is_pinned:
            LOG.warning("memory for saves cannot be pinned (CUDA error %d), so training stands still longer", code)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
