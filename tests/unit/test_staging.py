"""The buffer that saves are written from. What CUDA is asked for is looked at here; that it does it, in tests/cuda."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from everstep.rank_env import RankInfo
from everstep.trainer.checkpoint.layout import Layout, lay_out
from everstep.trainer.checkpoint.staging import Staging
from everstep.trainer.distributed.mesh import Mesh

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return lay_out(tensors, Mesh(RankInfo(), CPU))


@dataclass
class Cuda:
    """A CUDA that pins what it is told to, up to a limit."""

    limit: int = 10**9
    pinned: dict[int, int] = field(default_factory=dict)
    waits: int = 0

    def register(self, address: int, size: int, flags: int) -> int:
        if size > self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    runtime = SimpleNamespace(cudaHostRegister=cuda.register, cudaHostUnregister=cuda.pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    event = SimpleNamespace(record=lambda: None, synchronize=cuda.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return cuda


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_save_holds_the_state_as_it_was_and_one_buffer_serves_all(cuda: Cuda, device: torch.device) -> None:
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(7, dtype=torch.int16)}
    layout, staging = layout_of(tensors), Staging(device)
    staging.make_room(layout.bytes)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        staging.fill(layout, tensors)
        address = staging.buffer.data_ptr()
        for tensor in tensors.values():
            tensor.add_(1)
        content = torch.frombuffer(bytearray(staging.bytes(layout.bytes)), dtype=torch.uint8)
        for piece in layout.pieces:
            found = content[piece.start : piece.start + piece.length].view(piece.dtype).view(piece.sizes)
            assert torch.equal(found, before[piece.item.index.fqn])
        assert staging.buffer.data_ptr() == address
    assert cuda.pinned == ({} if device == CPU else {address: layout.bytes})
    assert cuda.waits == (0 if device == CPU else 2)


def test_memory_is_given_back_before_more_is_pinned(cuda: Cuda) -> None:
    staging = Staging(GPU)
    for count in (1000, 3001):
        tensors = {"a": torch.ones(count)}
        staging.fill(layout_of(tensors), tensors)
        assert list(cuda.pinned.values()) == [4 * count]


def test_a_machine_that_will_not_pin_saves_all_the_same(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.limit = 100
    tensors, staging = {"a": torch.arange(1000.0)}, Staging(GPU)
    layout = layout_of(tensors)
    staging.fill(layout, tensors)
    assert torch.equal(torch.frombuffer(staging.bytes(layout.bytes), dtype=torch.float32), tensors["a"])
    assert "cannot be pinned (CUDA error 2)" in caplog.text


def test_a_rank_without_a_piece_needs_no_memory(cuda: Cuda) -> None:
    staging = Staging(GPU)
    staging.make_room(0)
    staging.fill(layout_of({}), {})
    assert (len(staging.bytes(0)), cuda.pinned) == (0, {})
