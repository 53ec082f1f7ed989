"""Memory estimate of a run for each rank, computed without memory.

The model is on the meta device, sharded as it will be, over a fake process group of the given size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everstep.config import Dtype, ParallelConfig, ParallelKind, RunConfig
from everstep.errors import ConfigError
from everstep.rank_env import RankInfo
from everstep.trainer.distributed.mesh import Mesh, grid
from everstep.trainer.distributed.model_factory import COMPUTE, sharded_on_meta
from everstep.trainer.distributed.sharding import find_units, parameters_on_meta, shardable_units
from everstep.trainer.optim import build_optimizer, local
from everstep.trainer.state.model_state import check_model

SHARDED = (ParallelKind.fsdp, ParallelKind.hsdp)
IN_FLIGHT = 2
"""Units that FSDP holds whole at a time: the one that computes and the next."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, without activations."""

    parameters: int
    """Number of parameters of the whole model."""
    weights: int
    gradients: int
    optimizer: int | None
    """None if the optimizer's state cannot be made without memory."""
    average: int
    buffers: int
    gathered: int
    """Gathered weights of FSDP: the largest units, whole, in the type that they compute in."""

    @property
    def device(self) -> int:
        return self.weights + self.gradients + (self.optimizer or 0) + self.average + self.buffers + self.gathered

    @property
    def staged(self) -> int:
        """Bytes of a checkpoint's copy on the host while it is written."""
        return self.weights + (self.optimizer or 0) + self.average + self.buffers

    def table(self, world: int, kind: str) -> list[str]:
        rows = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "average (ema)": self.average,
            "buffers": self.buffers,
            f"{IN_FLIGHT} largest units, whole": self.gathered,
            "on the device": self.device,
            "a checkpoint's copy, on the host": self.staged,
        }
        shown = [f"  {name:<34} {_readable(size):>12}" for name, size in rows.items() if size != 0]
        return [f"memory of each of {_processes(world)} ({kind}), without activations:", *shown]

    def line(self, world: int, kind: str) -> str:
        """Return the estimate in one line instead of a table."""
        where = f"on each of {_processes(world)} ({kind})"
        return f"{self.parameters:,} parameters take {_readable(self.device)} {where}, without activations"


def footprint(run: RunConfig, build: Callable[[], nn.Module], mesh: Mesh) -> Footprint:
    """Return the memory of rank 0.

    Raises:
        EverstepError: the model cannot be built or laid out in this way.
    """
    if mesh.grid is not None and run.parallel.kind in SHARDED:
        model, _ = sharded_on_meta(build, mesh, run.parallel, run.precision, run.seed)
    else:
        with parameters_on_meta(), torch.no_grad():
            model = build()
            model = model.double() if run.precision.dtype is Dtype.fp64 else model
    check_model(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters())
    return Footprint(
        sum(p.numel() for p in model.parameters()),
        weights,
        _bytes(trained),
        _optimizer_state(run, model),
        _bytes(trained) if run.ema is not None else 0,
        _bytes(model.buffers()),
        _gathered(run, model) if mesh.grid is not None else 0,
    )


@contextlib.contextmanager
def pretended(parallel: ParallelConfig, world: int) -> Iterator[Mesh]:
    """Yield a mesh of `world` processes of which only this one exists; collectives return at once.

    Collectives move no data.
    """
    if world == 1:
        yield Mesh(RankInfo(), torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Mesh(RankInfo(world=world), torch.device("cpu"), grid(parallel, world, torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def _optimizer_state(run: RunConfig, model: nn.Module) -> int | None:
    """Return the size of the optimizer's state, made in a first step on the meta device without memory."""
    if run.optimizer is None:
        raise ConfigError("optimizer=null: give optimizer=NAME")
    optimizer = build_optimizer(run.optimizer, model, run.plugins)
    for group in optimizer.param_groups:
        if "fused" in group:  # the kernel exists on real devices only, and its state is the same
            group["fused"] = None
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # a user's own optimizer may read values, which do not exist on the meta device
        return None
    finally:
        optimizer.zero_grad(set_to_none=True)
    state = [value for each in optimizer.state.values() for value in each.values()]
    return _bytes(value for value in state if isinstance(value, Tensor))


def _gathered(run: RunConfig, model: nn.Module) -> int:
    """Return the size of FSDP's largest whole units: the blocks, and the parameters outside all of them."""
    dtype = COMPUTE[run.precision.dtype]
    units = shardable_units(model, find_units(model, run.parallel.wrap))
    inside = [list(unit.parameters()) for unit in units.values()]
    known = {id(parameter) for unit in inside for parameter in unit}
    whole = [*inside, [p for p in model.parameters() if id(p) not in known]]
    sizes = [sum(p.numel() * (dtype or p.dtype).itemsize for p in unit) for unit in whole]
    return sum(sorted(sizes)[-IN_FLIGHT:])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum((part := local(tensor.detach())).numel() * part.element_size() for tensor in tensors)


def _processes(count: int) -> str:
    return f"{count} {'process' if count == 1 else 'processes'}"


def _readable(size: int | None) -> str:
    if size is None:
        return "not known"
    power = min(3, max(1, (size.bit_length() - 1) // 10))
    return f"{size / 1024**power:,.1f} {' KMG'[power]}iB"
