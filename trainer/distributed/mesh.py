"""Mesh of processes: this process's rank and device, the group of all, and their agreements.

The group is always formed over a store prefix of its own. torchrun may give the same store to every restart, and the
keys of an earlier start then contain addresses at which no process listens. So the processes of one start first agree
on a generation that no earlier start can have had.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from everstep.config import ParallelConfig, ParallelKind
from everstep.errors import ConfigError, EverstepError, MachineError
from everstep.fault import chain
from everstep.rank_env import RankInfo
from everstep.security.job_secrets import START_KEY, STORE
from everstep.trainer.distributed import gloo_peers, json_collectives
from everstep.trainer.distributed.store_client import RunStore
from everstep.trainer.watchdog.activity import Activity

T = TypeVar("T")
U = TypeVar("U")
FIRST_POLL_S, LONGEST_POLL_S = 0.005, 0.2
"""Seconds between two reads of the store, since thousands of processes may read at once."""
HEARD_S = 5.0
"""Seconds that rank 0, which has refused to start, waits for the other ranks to read the reason."""


@dataclass(frozen=True)
class Mesh:
    """The processes of this start.

    `grid` has the dimension `shard`, and `replicate` before it under hsdp.
    """

    place: RankInfo
    device: torch.device
    grid: DeviceMesh | None = None
    store: Store | None = None
    """Store that only the processes of this start share."""
    secret: bytes = field(default=b"", repr=False)
    """Secret that only the processes of this start share."""
    activity: Activity = field(default_factory=Activity, repr=False, compare=False)
    """Place in the run that this rank marks for the watchdog."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def is_main(self) -> bool:
        return self.place.rank == 0

    def decide(self, decision: Callable[[], T]) -> T:
        """Return rank 0's decision, a JSON value, on all ranks; its EverstepError is raised on all."""
        if self.world == 1:
            return decision()
        said: dict[str, Any] = {}
        if self.is_main:
            try:
                said = {"value": decision()}
            except EverstepError as error:
                said = {"error": json_collectives.pack_error(error)}
        said = json_collectives.broadcast(said, self.rank)
        if "error" in said:
            raise _raised(said["error"], told=not self.is_main)
        decided: T = said["value"]
        return decided

    def exchange(self, value: T, answer: Callable[[list[T]], list[U]]) -> U:
        """Send each rank's JSON value to rank 0 and its answers back; its EverstepError is raised on all."""
        if self.world == 1:
            return answer([value])[0]
        values: list[T] = json_collectives.gather_on_main(value, self.rank, self.world)
        answers: list[U] = []
        self.decide(lambda: answers.extend(answer(values)))
        given: U = json_collectives.scatter(answers, self.rank, self.world)
        return given

    def together(self, work: Callable[[], object]) -> None:
        """Do `work` on all ranks; the first EverstepError is raised on all."""
        failed: EverstepError | None = None
        try:
            work()
        except EverstepError as error:
            if self.world == 1:
                raise
            failed = error
        for rank, each in enumerate(self.gather(None if failed is None else json_collectives.pack_error(failed))):
            if each is not None:
                raise _raised(each, told=rank != self.rank)

    def gather(self, value: T) -> list[T]:
        """Return each rank's JSON value, on all ranks."""
        return [value] if self.world == 1 else json_collectives.gather(value, self.world)

    def new_gloo_group(self) -> dist.ProcessGroup:
        """Make another group of all ranks, for messages that overlap with those of training."""
        with gloo_peers.closed_afterwards():
            group: dist.ProcessGroup = dist.new_group(backend="gloo")
        gloo_peers.prove(group, self.secret)
        return group

    def all(self, fact: bool) -> bool:
        """True if `fact` is true on every rank."""
        if self.world == 1:
            return fact
        agreed = torch.tensor(float(fact))
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed.item())

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def _raised(packed: dict[str, Any], told: bool) -> EverstepError:
    error = json_collectives.unpack_error(packed)
    error.told = told
    return error


def join(place: RankInfo, timeout_s: float) -> Store:
    """Return a store that only the processes of this start share."""
    address, key = os.environ.pop(STORE, ""), os.environ.pop(START_KEY, "")  # processes that we start need neither
    store: Store
    if address:
        store = RunStore(address, bytes.fromhex(key), timeout_s)
    else:  # torchrun was started by hand
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return PrefixStore(f"everstep/{agree_on_generation(store, place, timeout_s)}", store)


def agree_on_generation(store: Store, place: RankInfo, timeout_s: float) -> str:
    """Return a name for this start on which all its processes agree, over a store with older keys.

    Each process writes a number used once, and waits for an answer under that number: no earlier start can have left
    one. Rank 0 answers all ranks with a digest of the numbers, and again whenever one of them changes. Each process
    that accepts a name increments its counter; the last one marks the name as complete. So no key or value grows with
    the world size, except the list that rank 0 reads.
    """
    prefix, mine, deadline = f"everstep/join/{place.world}", uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"{prefix}/{place.rank}", mine)
    numbers = Numbers(store, prefix, place.world) if place.rank == 0 else None
    accepted, pause_s = "", FIRST_POLL_S
    while time.monotonic() < deadline:
        if numbers is not None:
            numbers.answer()
        seen = _peek(store, f"{prefix}/answer/{mine}")
        if seen != accepted:
            accepted = seen
            if store.add(f"{prefix}/accepted/{accepted}", 1) == place.world:
                store.set(f"{prefix}/complete/{accepted}", "1")
        if accepted and store.check([f"{prefix}/complete/{accepted}"]):
            return accepted
        time.sleep(pause_s)
        pause_s = min(LONGEST_POLL_S, 1.5 * pause_s)
    raise MachineError(f"rank {place.rank}: the {place.world} processes did not all join within {timeout_s:.0f} s")


class Numbers:
    """Numbers that all ranks have written, as rank 0 has read them."""

    def __init__(self, store: Store, prefix: str, world: int) -> None:
        self.store = store
        self.prefix = prefix
        self.keys = [f"{prefix}/{rank}" for rank in range(world)]
        self._answered: list[bytes] = []

    def answer(self) -> None:
        """Answer all ranks, if all have written a number and one of them is new."""
        if not self.store.check(self.keys):
            return
        numbers = self.store.multi_get(self.keys)
        if numbers == self._answered:
            return
        self._answered = numbers
        name = uuid.uuid5(uuid.NAMESPACE_OID, b",".join(numbers).decode()).hex
        keys = [f"{self.prefix}/answer/{number.decode()}" for number in numbers]
        self.store.multi_set(keys, [name] * len(keys))  # type: ignore[attr-defined]  # missing in torch's stubs


def _peek(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def tell(store: Store, place: RankInfo, decision: Callable[[], str]) -> str:
    """Broadcast rank 0's text or error over the store, like `Mesh.decide` before there is a group."""
    if place.rank == 0:
        try:
            store.set("told", "+" + decision())
        except EverstepError as error:
            store.set("told", f"-{type(error).__name__}: {error}")
            _await_readers(store, place.world - 1)
            raise
    told = store.get("told").decode()
    if told[0] == "-":
        store.add("heard", 1)
        raise ToldError(told[1:])
    return told[1:]


def _await_readers(store: Store, readers: int) -> None:
    """Wait until all ranks have read: the store ends with rank 0, and a late reader would fail by itself."""
    deadline = time.monotonic() + HEARD_S
    while store.add("heard", 0) < readers and time.monotonic() < deadline:
        time.sleep(FIRST_POLL_S)


class ToldError(EverstepError):
    """An error that rank 0 has raised and reported; this rank only exits."""

    told = True


def form(place: RankInfo, store: Store | None, parallel: ParallelConfig, timeout_s: float) -> Mesh:
    """Join the group and lay out the grid of devices as `parallel` configures."""
    parallel.check_world(place.world)
    device = _device(place)
    if store is None:
        return Mesh(place, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with gloo_peers.closed_afterwards():
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=timeout_s)
        )
        layout = grid(parallel, place.world, device)
    groups = [*([] if layout is None else layout.get_all_groups()), dist.group.WORLD]
    mesh = Mesh(place, device, layout, store, gloo_peers.shared_secret(store, place.rank))
    for group in {id(group): group for group in groups if group is not None}.values():
        gloo_peers.prove(group, mesh.secret)
    return mesh


def _device(place: RankInfo) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError(
            f"process {place.local_rank} of this node has no GPU: there are {count}; set job.nproc={count}"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def grid(parallel: ParallelConfig, world: int, device: torch.device) -> DeviceMesh | None:
    """Return the layout of the processes that share one copy of the model; None if each has its own."""
    if parallel.kind is ParallelKind.fsdp:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if parallel.kind is ParallelKind.hsdp and parallel.shard is not None:
        shape = (world // parallel.shard, parallel.shard)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return None


def lost_peer(error: BaseException) -> bool:
    """True if the error comes from the loss of another rank, in a collective.

    gloo has no error type of its own for that, so its messages are matched.
    """
    return any(
        isinstance(each, dist.DistError) or (isinstance(each, RuntimeError) and "gloo" in str(each))
        for each in chain(error)
    )


def part() -> None:
    """Wait for all ranks at the end; the process must then exit by `os._exit`.

    The group is not destroyed: when its last owner is a Python object (DDP's reducer is one), gloo's destructor joins a
    thread that waits for the GIL which the destroying thread holds, and the process hangs (torch 2.13).
    """
    if dist.is_initialized():
        dist.barrier()
