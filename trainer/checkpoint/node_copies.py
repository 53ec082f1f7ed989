"""Automatic copies of the state to the node tier, while nothing is in their way."""

from __future__ import annotations

import logging
import time
from dataclasses import astuple

from everstep.config import CheckpointConfig
from everstep.errors import ConfigError
from everstep.run_folder import RunFolder
from everstep.run_id import run_id
from everstep.trainer.checkpoint import node_room
from everstep.trainer.checkpoint.copy_schedule import CopySchedule, Plan
from everstep.trainer.checkpoint.node_tier import NodeTier, node_folder
from everstep.trainer.checkpoint.pending_save import SaveRecord
from everstep.trainer.distributed.mesh import Mesh

LOG = logging.getLogger("everstep")


class NodeCopies:
    """Decisions about copies: the steps at which they are made, and the room that the nodes have for them."""

    def __init__(self, tier: NodeTier, every: int) -> None:
        """`every` is the number of steps between checkpoints in the run folder."""
        self.schedule = CopySchedule(every)
        self._tier = tier
        self._said = False
        self._polled: float | None = None
        if tier.leads:
            node_room.remove_stale(tier.storage)

    def polled(self, pending: SaveRecord | None) -> None:
        """Measure the step since the last call, if no other save than a copy is pending."""
        now = time.perf_counter()
        if self._polled is not None and (pending is None or pending.automatic):
            self.schedule.step_took(now - self._polled, pending is not None)
        self._polled = now

    def skip_step(self) -> None:
        """Leave the present step out of the measurements, since training stands still in it."""
        self._polled = None

    def may_copy(self, blocked: bool, sizes: list[int] | None) -> bool:
        """True if a copy can begin now, on all ranks."""
        if self.schedule.plan is None:  # the first time, only the first copy is planned
            return False
        return self._tier.mesh.all(not blocked and sizes is not None and self._has_room(sizes))

    def plan(self, step: int) -> None:
        """Plan the next copy as rank 0 has measured."""
        self.schedule.plan = Plan(*self._tier.mesh.decide(lambda: list(astuple(self.schedule.next_plan(step)))))

    def _has_room(self, sizes: list[int]) -> bool:
        """True if this node can spare what a copy takes; where it is short, its copies are removed too."""
        if not self._tier.leads:
            return True
        try:
            node_room.mark(self._tier.storage)
            needed, free = self._tier.bytes_here(sizes), node_room.free_bytes(self._tier.storage.root)
        except OSError as error:
            return self._refuse(f"{self._tier.storage.root}: {error.strerror or error}")
        if node_room.PARTS * needed <= free:
            return True
        if free < needed:
            self._tier.keep_newest(0)
        return self._refuse(f"a copy takes {needed / 1e6:.0f} MB, of {free / 1e6:.0f} MB that are free")

    def _refuse(self, why: str) -> bool:
        if not self._said:
            self._said = True
            LOG.info("no copies on this node, a lost process costs up to checkpoint.every steps: %s", why)
        return False


def open_tier(config: CheckpointConfig, folder: RunFolder, mesh: Mesh) -> NodeTier | None:
    """Return the node tier; None if there is to be none, or if automatic copies have no place.

    Raises:
        ConfigError: the folder that `checkpoint.local.path` names cannot be used, and `every` asks for it.
    """
    if config.local.every is None:
        return None
    identity = mesh.decide(lambda: run_id(folder))
    if not config.local.is_automatic:
        return NodeTier(config.local, folder.url, mesh, identity)
    if not mesh.all(_has_place(config)):
        return None
    return NodeTier(config.local, folder.url, mesh, identity)


def _has_place(config: CheckpointConfig) -> bool:
    try:
        node_folder(config.local.path)
    except ConfigError as error:
        LOG.info("no copies on this node, a lost process costs up to checkpoint.every steps: %s", error)
        return False
    return True
