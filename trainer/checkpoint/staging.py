"""Copy of the state for a save: checked, laid out, and copied into a buffer that is allocated once."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everstep.trainer.checkpoint.layout import Layout, key_of, lay_out
from everstep.trainer.checkpoint.manifest import Manifest, ManifestFacts
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Packed, TrainState

LOG = logging.getLogger("everstep")
COMPARE_EVERY = 16
"""The ranks' states are compared at the first save, every so many saves, and at the last save."""
_PORTABLE = 1
"""Flag of cudaHostRegister: pinned for every GPU of this process."""


@dataclass(frozen=True)
class StagedState:
    """Copied state of one step: the bytes of this rank, and the manifest, which lists no files yet."""

    layout: Layout
    buffer: Staging
    manifest: Manifest

    def data(self) -> memoryview:
        """Return the bytes of this rank's file, after waiting for the copies."""
        return self.buffer.bytes(self.layout.bytes)


class StateStager:
    """Copies the state of one attempt for its saves."""

    def __init__(self, state: TrainState, mesh: Mesh, facts: ManifestFacts, compare: bool) -> None:
        """`compare` checks at some saves that the ranks agree on the state."""
        self.state = state
        self.mesh = mesh
        self.facts = facts
        self.compare = compare
        self._buffer = Staging(mesh.device)
        self._layout: Layout | None = None
        self._saves = 0

    def preallocate(self) -> bool:
        """Plan the layout and allocate the buffer before the first save needs them; True the first time."""
        if self._layout is not None:
            return False
        self._layout = lay_out(self.state.pack().tensors, self.mesh)
        self._buffer.make_room(self._layout.bytes)
        return True

    @property
    def sizes(self) -> list[int] | None:
        """Return the bytes of each rank's file; None before they are planned."""
        return None if self._layout is None else self._layout.sizes

    def stage(self, last: bool, prepare: bool = True) -> StagedState:
        """Copy the current state; the copy is valid until the next one.

        Args:
            last: the run ends with this save, so the ranks are compared.
            prepare: compare the ranks, and make buffers that differ equal; False leaves the state as it is.
        """
        packed = self._pack(last) if prepare else self.state.pack()
        layout = self._plan(packed.tensors)
        self._buffer.fill(layout, packed.tensors)
        return StagedState(layout, self._buffer, self._manifest(packed.values))

    def _pack(self, last: bool) -> Packed:
        """Return the packed state to save, after checking that the ranks agree on it."""
        if self.state.buffers is not None:
            self.state.buffers.before_save()
        if self.compare and (last or self._saves % COMPARE_EVERY == 0):
            self.state.check_agreement(self.mesh)
        self._saves += 1
        return self.state.pack()

    def _plan(self, tensors: dict[str, Tensor]) -> Layout:
        """Return the layout; all ranks plan it again if one of them has other tensors than at the last save."""
        if not self.mesh.all(self._layout is not None and self._layout.key == key_of(tensors)):
            self._layout = None
        if self._layout is None:
            self._layout = lay_out(tensors, self.mesh)
        return self._layout

    def _manifest(self, values: dict[str, Any]) -> Manifest:
        progress = self.state.progress
        return Manifest(
            step=progress.step,
            attempt=self.facts.attempt,
            samples=progress.samples(self.facts.global_batch),
            world=self.mesh.world,
            parallel=self.facts.parallel,
            time=time.time(),
            config_digest=self.facts.config_digest,
            data_digest=self.facts.data_digest,
            progress=self.state.numbers(),
            values={**values, **self.facts.excluded.values(progress.step)},
            metric=progress.metric if progress.evaluated == progress.step else None,
            signature=str(self.facts.binding),
        )


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
