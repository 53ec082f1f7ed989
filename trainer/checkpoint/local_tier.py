"""Frequent checkpoints on the nodes' own disks or memory, each rank's part on two of them.

A part lies on the node that wrote it and on the next one, so the loss of any one node loses none (Wang et al.,
"Gemini", SOSP 2023). Every node keeps the manifest; one of them is enough. A folder without it does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from blake3 import blake3

from trainer.checkpoint.flight import Files, write_file
from trainer.checkpoint.layout import Layout, file_of
from trainer.checkpoint.manifest import TENSORS, FileRecord, parse_name
from trainer.config import LocalTierConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.mesh import Mesh
from trainer.run_folder import MANIFEST
from trainer.storage import LocalStorage

KEEP = 2
"""Checkpoints on each node: the newest, and the one before until the newest is complete everywhere."""
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Pair:
    """A rank that gives its part, and the rank on the next node that keeps it."""

    giver: int
    keeper: int


class LocalTier:
    """This rank's view of the tier; all ranks make one together."""

    def __init__(self, config: LocalTierConfig, run_url: str, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.storage = LocalStorage(f"{node_folder(config.path)}/{blake3(run_url.encode()).hexdigest(16)}")
        self.nodes: list[int] = mesh.gather(mesh.place.node)
        """By rank."""
        self.leads = self.nodes.index(mesh.place.node) == mesh.rank
        """Whether this rank acts for its node."""
        self.pairs = pair_up(self.nodes)
        # A group of its own, since its messages pass beside training.
        self._group = dist.new_group(backend="gloo") if self.pairs else None

    def due(self, step: int) -> bool:
        return self.config.every is not None and step > 0 and step % self.config.every == 0

    def write(self, layout: Layout, path: str, data: memoryview) -> Files:
        """Write this rank's part here and on the next node, and keep what other ranks give."""
        files: Files = {}
        if layout.pieces:
            files[layout.file] = write_file(self.storage, f"{path}/{layout.file}", data)
        for name, record in self._replicate(path, data, layout.sizes):
            files[f"{REPLICA}{name}"] = record
        return files

    def _replicate(self, path: str, data: memoryview, sizes: list[int]) -> Iterator[tuple[str, FileRecord]]:
        """All pairs at once, a block at a time, so that no rank holds more than a block of what is not its own."""
        keepers = [pair.keeper for pair in self.pairs if pair.giver == self.mesh.rank]
        givers = [pair.giver for pair in self.pairs if pair.keeper == self.mesh.rank]
        mine = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
        digests = {giver: blake3() for giver in givers}
        with ExitStack() as stack:
            files = {g: stack.enter_context(self.storage.writer(f"{path}/{file_of(g)}")) for g in givers if sizes[g]}
            for start in range(0, max(sizes), BLOCK_BYTES):
                sent = [dist.isend(part, keeper, group=self._group)
                        for keeper in keepers if len(part := mine[start : start + BLOCK_BYTES])]  # fmt: skip
                for giver, file in files.items():
                    if sizes[giver] > start:
                        block = torch.empty(min(BLOCK_BYTES, sizes[giver] - start), dtype=torch.uint8)
                        dist.recv(block, giver, group=self._group)
                        file.write(memoryview(block.numpy()))  # type: ignore[arg-type]
                        digests[giver].update(memoryview(block.numpy()))  # type: ignore[arg-type]
                for work in sent:
                    if work is not None:
                        work.wait()
        yield from ((file_of(g), FileRecord(sizes[g], digests[g].hexdigest())) for g in files)

    def seal(self, path: str, manifest: str, table: bytes) -> None:
        """On each node, when all parts are written: the table and, last, the manifest; older ones are removed."""
        if not self.leads:
            return
        self.storage.write(f"{path}/{TENSORS}", table)
        self.storage.create(f"{path}/{MANIFEST}", manifest.encode())
        self.keep_newest(KEEP)

    def keep_newest(self, count: int) -> None:
        """On each node: remove all but the newest sealed ones, and what was never sealed."""
        if not self.leads:
            return
        names = sorted((name for name in self.storage.names() if parse_name(name)), reverse=True)
        sealed = [name for name in names if self.storage.exists(f"{name}/{MANIFEST}")]
        for name in set(names) - set(sealed[:count]):
            self.storage.delete(f"{name}/{MANIFEST}")
            self.storage.delete(name)


REPLICA = "replica of "
"""What a keeper's word for a file begins with."""


def without_replicas(files: Files) -> Files:
    """The files that their givers speak of; CheckpointError where a keeper has another one."""
    own = {name: record for name, record in files.items() if not name.startswith(REPLICA)}
    for name, record in files.items():
        if name.startswith(REPLICA) and own.get(name.removeprefix(REPLICA)) != record:
            raise CheckpointError(f"the {name} is not what was sent")
    return own


def pair_up(nodes: list[int]) -> list[Pair]:
    """Each rank with one on the next node, the work spread over that node's ranks; none where there is one node."""
    order = sorted(set(nodes))
    if len(order) < 2:
        return []
    ranks = {node: [rank for rank, on in enumerate(nodes) if on == node] for node in order}
    pairs = []
    for rank, node in enumerate(nodes):
        there = ranks[order[(order.index(node) + 1) % len(order)]]
        pairs.append(Pair(rank, there[ranks[node].index(rank) % len(there)]))
    return pairs


def node_folder(path: str) -> str:
    """The folder on this node; ConfigError where it rests on a variable that is not set here."""
    folder = os.path.expanduser(os.path.expandvars(path))
    if "$" in folder:
        raise ConfigError(f"checkpoint.local.path={path!r}: this node has no such variable in its environment")
    return folder
