"""Node tier: frequent checkpoints on the nodes' own disks or memory, each rank's file on two nodes.

A file is stored on the node that wrote it and on the next one, so the loss of any one node loses no file (Wang et al.,
"Gemini", SOSP 2023). Every node keeps the manifest; one of them is enough. A folder without it does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3

from everstep.config import LocalTierConfig
from everstep.run_folder import MANIFEST, RunFolder
from everstep.security.private_folder import expand, private_folder
from everstep.storage import LocalStorage
from everstep.superseded_checkpoints import Lineage
from everstep.trainer.checkpoint import node_room
from everstep.trainer.checkpoint.manifest import Committed, parse_checkpoint, parse_name, signed_run
from everstep.trainer.checkpoint.read import DamagedError
from everstep.trainer.distributed.mesh import Mesh

KEEP = 2
"""Checkpoints kept on each node: the newest, and the one before it.

The latter is needed until the newest is complete on all nodes.
"""
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ReplicaPair:
    """A rank that sends its file, and the rank on the next node that stores the replica."""

    sender: int
    holder: int


class NodeTier:
    """This rank's view of the node tier; all ranks construct it together."""

    def __init__(self, config: LocalTierConfig, run_url: str, mesh: Mesh, identity: str = "") -> None:
        """Open the tier; automatic copies have no replicas.

        Args:
            identity: id of the run, so that another run in a folder of the same name does not resume from it.
        """
        self.config = config
        self.mesh = mesh
        name = blake3(f"{run_url}\n{identity}".encode()).hexdigest(16)
        self.storage = LocalStorage(f"{node_folder(config.path)}/{name}")
        self.nodes: list[int] = mesh.gather(mesh.place.node)
        """Node of each rank, by rank."""
        self.leads = self.nodes.index(mesh.place.node) == mesh.rank
        """True if this rank acts for its node."""
        self.pairs = [] if config.is_automatic else pair_up(self.nodes)
        # A group of its own, since its messages overlap with those of training.
        self.group = mesh.new_gloo_group() if self.pairs else None

    def due(self, step: int) -> bool:
        return isinstance(self.config.every, int) and step > 0 and step % self.config.every == 0

    def bytes_here(self, sizes: Sequence[int]) -> int:
        """Return the bytes of a checkpoint on this node, without replicas."""
        return sum(size for size, node in zip(sizes, self.nodes, strict=True) if node == self.mesh.place.node)

    def keep_newest(self, count: int) -> None:
        """Remove on each node all but the newest committed checkpoints, and those never committed."""
        if not self.leads:
            return
        names = sorted((name for name in self.storage.names() if parse_name(name)), reverse=True)
        sealed = [name for name in names if self.storage.exists(f"{name}/{MANIFEST}")]
        for name in set(names) - set(sealed[:count]):
            self.storage.delete(f"{name}/{MANIFEST}")
            self.storage.delete(name)
        if not count:
            node_room.forget(self.storage)


def pair_up(nodes: list[int]) -> list[ReplicaPair]:
    """Pair each rank with one on the next node, spread evenly over that node's ranks; empty with one node."""
    order = sorted(set(nodes))
    if len(order) < 2:
        return []
    ranks = {node: [rank for rank, on in enumerate(nodes) if on == node] for node in order}
    pairs = []
    for rank, node in enumerate(nodes):
        there = ranks[order[(order.index(node) + 1) % len(order)]]
        pairs.append(ReplicaPair(rank, there[ranks[node].index(rank) % len(there)]))
    return pairs


KEY = "checkpoint.local.path"


def node_folder(path: str) -> str:
    """Return the folder on this node.

    Raises:
        ConfigError: other users may read or replace it, or it names a variable that is not set or not allowed.
    """
    return str(private_folder(expand(path, KEY), KEY))


Inventory = dict[str, list[Any]]
"""By checkpoint: the manifest's bytes as Latin-1 text, and the size of each file.

The text is empty if the node has no manifest.
"""


@dataclass(frozen=True)
class NodeCheckpoint(Committed):
    """A checkpoint that the node tiers of all nodes together hold completely."""

    tier: NodeTier
    holders: dict[str, list[int]]
    """For each file, the ranks (one per node) whose nodes hold it."""


def find_on_nodes(tier: NodeTier, folder: RunFolder) -> list[NodeCheckpoint]:
    """Return the complete checkpoints in the run's line, newest first, the same on all ranks."""
    inventories = tier.mesh.gather(_take_inventory(tier) if tier.leads else {})
    pairs: list[tuple[int, int]] = tier.mesh.decide(lambda: list(folder.lineage().restored.items()))
    lineage = Lineage(dict(pairs))
    run_id = tier.mesh.decide(lambda: signed_run(folder))
    found = []
    for name in {name for inventory in inventories for name in inventory}:
        if (key := parse_name(name)) is not None and lineage.counts(*key):
            found += _complete(tier, name, key, inventories, run_id)
    return sorted(found, key=lambda each: (each.step, each.attempt), reverse=True)


def _take_inventory(tier: NodeTier) -> Inventory:
    found: Inventory = {}
    for name in tier.storage.names():
        files = {file: tier.storage.size(f"{name}/{file}") for file in tier.storage.names(name) if file != MANIFEST}
        try:
            found[name] = [tier.storage.read(f"{name}/{MANIFEST}").decode("latin-1"), files]
        except FileNotFoundError:
            found[name] = ["", files]
    return found


def _complete(
    tier: NodeTier, name: str, key: tuple[int, int], inventories: list[Inventory], run_id: str | None
) -> list[NodeCheckpoint]:
    manifests = [inventory[name][0] for inventory in inventories if name in inventory and inventory[name][0]]
    found = parse_checkpoint(name, *key, manifests[0].encode("latin-1"), run_id) if manifests else None
    if not isinstance(found, Committed):
        return []
    holders = {
        file: [rank for rank, has in enumerate(inventories) if name in has and has[name][1].get(file) == record.bytes]
        for file, record in found.manifest.files.items()
    }
    return [NodeCheckpoint(name, found.manifest, tier, holders)] if all(holders.values()) else []


def copy_to_nodes(found: NodeCheckpoint, needed: Collection[str]) -> None:
    """Copy the files that this rank needs to its node, from nodes that have them."""
    tier = found.tier
    wanted = tier.mesh.gather(sorted(needed))
    for file, holders in sorted(found.holders.items()):
        for node in sorted(set(tier.nodes)):
            ranks = [rank for rank, on in enumerate(tier.nodes) if on == node]
            if ranks[0] not in holders and any(file in wanted[rank] for rank in ranks):
                # Nodes that lack the same file receive it from different nodes, if several have it.
                _copy_file(found, file, sender=holders[node % len(holders)], receiver=ranks[0])
    tier.mesh.together(functools.partial(_check_arrived, found, needed))


def _copy_file(found: NodeCheckpoint, file: str, sender: int, receiver: int) -> None:
    tier, path, size = found.tier, f"{found.path}/{file}", found.manifest.files[file].bytes
    if tier.mesh.rank == sender:
        for start in range(0, size, BLOCK_BYTES):
            data = tier.storage.read_range(path, start, min(size, start + BLOCK_BYTES))
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), receiver)
    elif tier.mesh.rank == receiver:
        with tier.storage.writer(path) as out:
            for start in range(0, size, BLOCK_BYTES):
                block = torch.empty(min(BLOCK_BYTES, size - start), dtype=torch.uint8)
                dist.recv(block, sender)
                out.write(memoryview(block.numpy()))  # type: ignore[arg-type]


def _check_arrived(found: NodeCheckpoint, needed: Collection[str]) -> None:
    for file in needed:
        if not found.tier.storage.exists(f"{found.path}/{file}"):
            raise DamagedError(f"{file} did not get to node {found.tier.mesh.place.node}")
