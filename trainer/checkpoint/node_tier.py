"""Node tier: frequent checkpoints on the nodes' own disks or memory, each rank's file on two nodes.

A file is stored on the node that wrote it and on the next one, so the loss of any one node loses no file (Wang et al.,
"Gemini", SOSP 2023). Every node keeps the manifest; one of them is enough. A folder without it does not count.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

import torch
import torch.distributed as dist
from blake3 import blake3

from everstep.config import LocalTierConfig
from everstep.errors import CheckpointError, ConfigError, StorageError
from everstep.run_folder import MANIFEST, RunFolder
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint.layout import Layout, file_of
from everstep.trainer.checkpoint.manifest import (
    TENSORS,
    CheckpointRef,
    FileRecord,
    Manifest,
    parse_name,
    read_candidate,
)
from everstep.trainer.checkpoint.pending_save import Files
from everstep.trainer.checkpoint.read import DamagedError
from everstep.trainer.distributed.mesh import Mesh

KEEP = 2
"""Checkpoints kept on each node: the newest, and the one before it.

The latter is needed until the newest is complete on all nodes.
"""
BLOCK_BYTES = 16 * 2**20


class DigestingFile:
    """A file of the node tier while it is written; an error is raised by `finish`, not before."""

    def __init__(self, storage: LocalStorage, path: str) -> None:
        self._digest = blake3()
        self._bytes = 0
        self._error: Exception | None = None
        self._open = ExitStack()
        self._file: IO[bytes] | None = None
        with self._noting():
            self._file = self._open.enter_context(storage.writer(path))

    def take(self, block: memoryview) -> None:
        if self._file is not None and self._error is None:
            with self._noting():
                self._file.write(block)
            self._digest.update(block)
            self._bytes += len(block)

    def finish(self) -> FileRecord:
        """Publish the file, or raise the error that occurred while it was written."""
        if self._error is not None:
            self._open.__exit__(type(self._error), self._error, None)
            raise self._error
        self._open.close()
        return FileRecord(self._bytes, self._digest.hexdigest())

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, StorageError) as error:
            self._error = error


@dataclass(frozen=True)
class ReplicaPair:
    """A rank that sends its file, and the rank on the next node that stores the replica."""

    giver: int
    keeper: int


class LocalTier:
    """This rank's view of the node tier; all ranks construct it together."""

    def __init__(self, config: LocalTierConfig, run_url: str, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.storage = LocalStorage(f"{node_folder(config.path)}/{blake3(run_url.encode()).hexdigest(16)}")
        self.nodes: list[int] = mesh.gather(mesh.place.node)
        """Node of each rank, by rank."""
        self.leads = self.nodes.index(mesh.place.node) == mesh.rank
        """True if this rank acts for its node."""
        self.pairs = pair_up(self.nodes)
        # A group of its own, since its messages overlap with those of training.
        self._group = dist.new_group(backend="gloo") if self.pairs else None

    def due(self, step: int) -> bool:
        return self.config.every is not None and step > 0 and step % self.config.every == 0

    def write(self, layout: Layout, path: str, data: memoryview) -> Files:
        """Write this rank's file to its node and the next one, and store replicas of other ranks.

        A rank that cannot write still sends and receives, since the other ranks wait for it.
        """
        sizes = layout.sizes
        own = {layout.file: DigestingFile(self.storage, f"{path}/{layout.file}")} if layout.pieces else {}
        kept = {
            p.giver: DigestingFile(self.storage, f"{path}/{file_of(p.giver)}")
            for p in self.pairs
            if p.keeper == self.mesh.rank and sizes[p.giver]
        }
        keepers = [pair.keeper for pair in self.pairs if pair.giver == self.mesh.rank]
        for start in range(0, max(sizes), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            sent = [dist.isend(_tensor(block), keeper, group=self._group) for keeper in keepers if len(block)]
            for each in own.values() if len(block) else ():
                each.take(block)
            for giver, each in kept.items():
                if sizes[giver] > start:
                    taken = torch.empty(min(BLOCK_BYTES, sizes[giver] - start), dtype=torch.uint8)
                    dist.recv(taken, giver, group=self._group)
                    each.take(memoryview(taken.numpy()))  # type: ignore[arg-type]
            for work in sent:
                if work is not None:
                    work.wait()
        files = {name: each.finish() for name, each in own.items()}
        return files | {f"{REPLICA}{file_of(giver)}": each.finish() for giver, each in kept.items()}

    def seal(self, path: str, manifest: str, table: bytes) -> None:
        """Commit on each node once all files are written: index, then manifest; then remove older ones."""
        if not self.leads:
            return
        self.storage.write(f"{path}/{TENSORS}", table)
        self.storage.create(f"{path}/{MANIFEST}", manifest.encode())
        self.keep_newest(KEEP)

    def keep_newest(self, count: int) -> None:
        """Remove on each node all but the newest committed checkpoints, and those never committed."""
        if not self.leads:
            return
        names = sorted((name for name in self.storage.names() if parse_name(name)), reverse=True)
        sealed = [name for name in names if self.storage.exists(f"{name}/{MANIFEST}")]
        for name in set(names) - set(sealed[:count]):
            self.storage.delete(f"{name}/{MANIFEST}")
            self.storage.delete(name)


REPLICA = "replica of "
"""Prefix of a replica's name in the records that a rank reports."""


def without_replicas(files: Files) -> Files:
    """Return the files without replicas.

    Raises:
        CheckpointError: a replica differs from its original.
    """
    own = {name: record for name, record in files.items() if not name.startswith(REPLICA)}
    for name, record in files.items():
        if name.startswith(REPLICA) and own.get(name.removeprefix(REPLICA)) != record:
            raise CheckpointError(f"the {name} is not what was sent")
    return own


def _tensor(block: memoryview) -> torch.Tensor:
    return torch.frombuffer(block, dtype=torch.uint8)


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


def node_folder(path: str) -> str:
    """Return the folder on this node.

    Raises:
        ConfigError: it uses an environment variable that this node does not set.
    """
    folder = os.path.expanduser(os.path.expandvars(path))
    if "$" in folder:
        raise ConfigError(f"checkpoint.local.path={path!r}: this node has no such variable in its environment")
    return folder


Inventory = dict[str, tuple[bytes, dict[str, int]]]
"""By checkpoint: the manifest's bytes (none if the node has no manifest) and the size of each file."""


@dataclass(frozen=True)
class Parts:
    """A checkpoint that the node tiers of all nodes together hold completely."""

    candidate: CheckpointRef
    holders: dict[str, list[int]]
    """For each file, the ranks (one per node) whose nodes hold it."""


def find_parts(tier: LocalTier, folder: RunFolder) -> list[Parts]:
    """Return the complete checkpoints in the run's line, newest first, the same on all ranks."""
    inventories = tier.mesh.gather(_look(tier) if tier.leads else {})
    limits = tier.mesh.decide(folder.limits)
    found = []
    for name in {name for inventory in inventories for name in inventory}:
        if (key := parse_name(name)) is not None and key[0] <= limits.get(key[1], 2**62):
            found += _complete(name, key, inventories)
    return sorted(found, key=lambda parts: (parts.candidate.step, parts.candidate.attempt), reverse=True)


def _look(tier: LocalTier) -> Inventory:
    found: Inventory = {}
    for name in tier.storage.names():
        files = {file: tier.storage.size(f"{name}/{file}") for file in tier.storage.names(name) if file != MANIFEST}
        try:
            found[name] = (tier.storage.read(f"{name}/{MANIFEST}"), files)
        except FileNotFoundError:
            found[name] = (b"", files)
    return found


def _complete(name: str, key: tuple[int, int], inventories: list[Inventory]) -> list[Parts]:
    manifests = [inventory[name][0] for inventory in inventories if name in inventory and inventory[name][0]]
    candidate = read_candidate(name, *key, manifests[0]) if manifests else None
    if candidate is None or candidate.manifest is None:
        return []
    holders = {
        file: [rank for rank, has in enumerate(inventories) if name in has and has[name][1].get(file) == record.bytes]
        for file, record in candidate.manifest.files.items()
    }
    return [Parts(candidate, holders)] if all(holders.values()) else []


def spread_parts(tier: LocalTier, parts: Parts, needed: Collection[str]) -> None:
    """Copy the files that this rank needs to its node, from nodes that have them."""
    wanted = tier.mesh.gather(sorted(needed))
    for file, holders in sorted(parts.holders.items()):
        for node in sorted(set(tier.nodes)):
            ranks = [rank for rank, on in enumerate(tier.nodes) if on == node]
            if ranks[0] not in holders and any(file in wanted[rank] for rank in ranks):
                # Nodes that lack the same file receive it from different nodes, if several have it.
                _send(tier, parts.candidate, file, holders[node % len(holders)], ranks[0])
    tier.mesh.together(functools.partial(_check, tier, parts, needed))


def _send(tier: LocalTier, candidate: CheckpointRef, file: str, giver: int, taker: int) -> None:
    if tier.mesh.rank not in (giver, taker) or candidate.manifest is None:
        return
    path, size = f"{candidate.path}/{file}", candidate.manifest.files[file].bytes
    if tier.mesh.rank == giver:
        for start in range(0, size, BLOCK_BYTES):
            data = tier.storage.read_range(path, start, min(size, start + BLOCK_BYTES))
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), taker)
        return
    with tier.storage.writer(path) as out:
        for start in range(0, size, BLOCK_BYTES):
            block = torch.empty(min(BLOCK_BYTES, size - start), dtype=torch.uint8)
            dist.recv(block, giver)
            out.write(memoryview(block.numpy()))  # type: ignore[arg-type]


def _check(tier: LocalTier, parts: Parts, needed: Collection[str]) -> None:
    manifest: Manifest | None = parts.candidate.manifest
    for file in needed:
        if manifest is None or not tier.storage.exists(f"{parts.candidate.path}/{file}"):
            raise DamagedError(f"{file} did not get to node {tier.mesh.place.node}")
