"""Membership of a job's pods, recorded by the pods themselves in the run folder.

members/JOB/INDEX-LIFE.json is create-only: the second pod of an index takes the second number. One listing therefore
shows which pods have been replaced, without a heartbeat: a disconnected pod has a successor with a higher number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from everstep.run_folder import MEMBERS, RunFolder


@dataclass(frozen=True, order=True)
class PodMember:
    index: int
    """Index of the pod in the job; a replacement has the same."""
    life: int = 1
    """Number of this pod among the pods of its index, counted from 1."""

    @property
    def host(self) -> str:
        """Name of the pod among the nodes of a start."""
        return f"pod-{self.index}.{self.life}"


@dataclass(frozen=True)
class PodMembership:
    folder: RunFolder
    job: str

    def join(self, index: int, facts: Mapping[str, str]) -> PodMember:
        """Take the next number of an index; the pod with the number before it is then replaced."""
        life = getattr(self.current().get(index), "life", 0) + 1
        record = (json.dumps({**facts, "time": time.time()}) + "\n").encode()
        while not self.folder.storage.create(f"{MEMBERS}/{self.job}/{index:04d}-{life:04d}.json", record):
            life += 1
        return PodMember(index, life)

    def current(self) -> dict[int, PodMember]:
        """Return the newest pod of each index."""
        found: dict[int, PodMember] = {}
        for name in self.folder.storage.names(f"{MEMBERS}/{self.job}"):
            index, _, life = name.removesuffix(".json").partition("-")
            if index.isdigit() and life.isdigit():
                member = PodMember(int(index), int(life))
                found[member.index] = max(member, found.get(member.index, member))
        return found
