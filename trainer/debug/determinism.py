"""Two steps, twice from the same state: equal to the last bit, or the place where the difference begins."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everstep.errors import DivergedError
from everstep.trainer.debug.anomaly import _tensors

if TYPE_CHECKING:
    from everstep.trainer.loop import Parts

STEPS = 2


@dataclass
class Trace:
    """Digests of what was computed, in its order."""

    outputs: list[tuple[str, str]] = field(default_factory=list)
    """Layer in a step → digest of its output."""
    state: dict[str, str] = field(default_factory=dict)

    def first_difference(self, other: Trace) -> str:
        """Return where two traces begin to differ; empty if they are equal."""
        for (name, digest), (_, again) in zip(self.outputs, other.outputs, strict=False):
            if digest != again:
                return f"the output of layer {name}"
        if len(self.outputs) != len(other.outputs):
            return f"the number of forward passes ({len(self.outputs)} and {len(other.outputs)} layers were called)"
        return next((f"{name}, after the steps" for name in self.state if self.state[name] != other.state[name]), "")


def check(parts: Parts) -> None:
    """Save, take two steps, restore, take them again, and compare; the state is then that after the second time.

    Raises:
        DivergedError: the two differ, on this rank or another.
    """
    start = parts.state.progress.step
    if parts.checkpoints.saved_step != start:
        parts.checkpoints.save(False, True)
        parts.checkpoints.finish()
    first = _two_steps(parts)
    parts.checkpoints.reload()
    parts.step.forget()
    second = _two_steps(parts)
    mesh = parts.step.parallel.mesh
    found = mesh.gather(first.first_difference(second))
    for rank, where in enumerate(found):
        if where:
            raise DivergedError(
                f"debug.determinism: two steps from step {start} differ when they are taken again, first in {where} "
                f"(rank {rank}); look for randomness without a seed, state outside of the model, and operators "
                "that torch.use_deterministic_algorithms(True) refuses"
            )
    line = f"{STEPS} steps from step {start} are the same twice: {len(first.outputs)} outputs of layers"
    parts.journal.event("deterministic", f"{line}, {len(first.state)} tensors of the state")


def _two_steps(parts: Parts) -> Trace:
    trace = Trace()
    hooks = [
        module.register_forward_hook(_recorder(trace, name))
        for name, module in parts.step.parallel.model.named_modules()
        if name
    ]
    try:
        batches = parts.loader.steps(parts.state.progress.step)
        for _ in range(STEPS):
            parts.step(next(batches))
        parts.step.results(all_of_them=True)
    finally:
        for hook in hooks:
            hook.remove()
    trace.state = {name: _digest(tensor) for name, tensor in sorted(parts.state.tensors().items())}
    return trace


def _recorder(trace: Trace, name: str) -> Any:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        trace.outputs.append((name, ",".join(map(_digest, _tensors(output)))))

    return record


def _digest(tensor: Tensor) -> str:
    plain = getattr(tensor, "_local_tensor", tensor).detach().cpu().contiguous()
    return hashlib.blake2b(plain.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()
