"""Dependence of a loss on the number of processes: own collectives, synchronised statistics.

Such a loss sees the microbatches that all processes take at a time. On another number of processes the same samples
give another loss, so a resume there is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import everstep.trainer
from everstep.errors import ConfigError
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.sync_batchnorm import SyncBatchNorm

WORLD = "world"
"""Entry of `resume.allow` that permits another number of processes."""
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_HARMLESS = ("barrier", "monitored_barrier_", "wait_tensor")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OF_TORCH = tuple(
    _TORCH + part
    for part in ("distributed/fsdp", "distributed/_composable", "distributed/tensor", "nn/parallel", "nn/modules")
)
"""Callers whose collectives depend on no number of processes, or that `synced_statistics` finds."""
_OURS = os.path.dirname(everstep.trainer.__file__) + os.sep


class OwnCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the collectives that a user's code calls, not DDP, FSDP, DTensor, SyncBatchNorm or Everstep."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = ""
        """File, line and function of the first one; empty if there is none."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.place and func.namespace in _NAMESPACES and func._opname not in _HARMLESS:
            self.place = _caller(sys._getframe(1))
        return func(*args, **(kwargs or {}))


def _caller(frame: FrameType | None) -> str:
    """Return the innermost frame outside torch as "FILE:LINE in FUNCTION"; empty if it is not a user's."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        if frame.f_code.co_filename.startswith(_OF_TORCH):
            return ""
        frame = frame.f_back
    if frame is None or os.path.realpath(frame.f_code.co_filename).startswith(os.path.realpath(_OURS)):
        return ""
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"


def synced_statistics(model: nn.Module, passes: int) -> str:
    """Return a SyncBatchNorm that sees less than the whole batch in a pass; empty without one."""
    if passes == 1:
        return ""
    found = (name for name, module in model.named_modules() if isinstance(module, SyncBatchNorm | nn.SyncBatchNorm))
    return next((f"{name}, a SyncBatchNorm" for name in found), "")


def check_world(place: str, restored_world: int | None, mesh: Mesh, allowed: Sequence[str]) -> None:
    """Raise ConfigError for a resume on another number of processes if the loss depends on it.

    Args:
        place: what depends on it; empty if nothing does.
        restored_world: processes that saved the restored checkpoint; None for a new run.
        allowed: `resume.allow`.
    """
    if not place or restored_world in (None, mesh.world) or WORLD in allowed:
        return
    raise ConfigError(
        f"{mesh.world} processes: the loss depends on their number, which was {restored_world}: {place} sees the "
        f"microbatches of all processes at a time; resume on {restored_world}, write the loss as batch_loss, which "
        f"depends on the whole batch alone, or allow other numbers with 'resume.allow=[{WORLD}]'"
    )


def found_by(work: Callable[[], object], mesh: Mesh) -> str:
    """Return the place of a collective that `work` calls by itself on any rank; empty if there is none."""
    with OwnCollectives() as seen:
        work()
    return next((place for place in mesh.gather(seen.place) if place), "")
