"""Inventory of the node tier's checkpoints, and transfer of their files between nodes.

After a restart the ranks may run on other nodes, more or fewer of them: files that any node holds are found and sent.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist

from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import Candidate, Manifest, parse_name, read_candidate
from everstep.trainer.checkpoint.node_tier import BLOCK_BYTES, LocalTier
from everstep.trainer.checkpoint.read import DamagedError

Inventory = dict[str, tuple[bytes, dict[str, int]]]
"""By checkpoint: the manifest's bytes (none if the node has no manifest) and the size of each file."""


@dataclass(frozen=True)
class Parts:
    """A checkpoint that the node tiers of all nodes together hold completely."""

    candidate: Candidate
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


def _send(tier: LocalTier, candidate: Candidate, file: str, giver: int, taker: int) -> None:
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
