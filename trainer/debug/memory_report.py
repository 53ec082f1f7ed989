"""Report of an out-of-memory error: what was allocated, by part, and what to change."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everstep.errors import EverstepError
from everstep.run_folder import RunFolder
from everstep.trainer.reporting.sinks import warn

if TYPE_CHECKING:
    from everstep.trainer.loop import Parts

KNOBS = "micro_batch={half} (same result), parallel.checkpoint_blocks=1, parallel=fsdp"


def report(parts: Parts) -> str:
    """Write the report and a snapshot of the allocator beside the rank's log; return a line for the user."""
    device, rank = parts.loader.device, parts.step.parallel.mesh.rank
    sizes = held(parts)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        sizes["activations and the rest"] = max(0, peak - sum(sizes.values()))
    told = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items())
    half = max(1, parts.loader.micro_batch // 2)
    line = f"it holds {told}; what helps: {KNOBS.format(half=half)}"
    try:
        _write(parts, device, rank, line)
    except (EverstepError, OSError, RuntimeError) as error:
        warn(f"the memory report of rank {rank} could not be written: {error}")
    return line


def held(parts: Parts) -> dict[str, int]:
    """Return the bytes of each part on this rank."""
    parameters = list(parts.state.model.parameters())
    optimizer = (value for state in parts.state.optimizer.state.values() for value in state.values())
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": _bytes(value for value in optimizer if isinstance(value, Tensor)),
        "buffers": _bytes(parts.state.model.buffers()),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in (getattr(t, "_local_tensor", t) for t in tensors))


def _write(parts: Parts, device: torch.device, rank: int, line: str) -> None:
    folder: RunFolder = parts.checkpoints.folder
    base = folder.attempt(parts.checkpoints.attempt, f"memory-rank-{rank:04d}")
    text = f"{line}\n"
    if device.type == "cuda":
        text += torch.cuda.memory_summary(device)
        snapshot = pickle.dumps(torch.cuda.memory._snapshot(device))
        folder.storage.write(f"{base}.pickle", snapshot)  # for https://pytorch.org/memory_viz
    folder.storage.write(f"{base}.txt", text.encode())
