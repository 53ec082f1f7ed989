"""Exchange of heartbeats, of the verdict and of evidence between the ranks of a start, over its store.

A rank writes one key and reads two or three per heartbeat, whatever the world size; only the judge reads all ranks'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everstep.trainer.watchdog.heartbeat import Heartbeat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

NONE = "-"
"""Verdict key before there is one: the store's reads wait for a missing key."""
REQUEST_S = 300.0
"""Upper bound of the time that one request takes before the store's client raises an error."""


class Exchange:
    """One rank's connection for the watchdog: the store's client admits one thread at a time."""

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        from torch._C._distributed_c10d import HashStore

        self.rank = rank
        self.world = world
        self._origin = store
        self._store: Store = HashStore() if store is None else store.clone()  # type: ignore[attr-defined]
        self._known: set[int] = set()
        """Ranks that have sent their first heartbeat: reads of a missing key would wait."""
        self._store.compare_set(_key("verdict"), "", NONE)

    @property
    def is_alone(self) -> bool:
        return self._origin is None

    def reconnect(self) -> None:
        """Open another connection, after one that failed, as behind a suspended host of the store."""
        if self._origin is not None:
            self._store = self._origin.clone()  # type: ignore[attr-defined]

    def send(self, heartbeat: Heartbeat) -> None:
        self._store.set(_key(self.rank), heartbeat.to_json())

    def read(self, ranks: Sequence[int]) -> tuple[str | None, dict[int, Heartbeat]]:
        """Return the verdict, if any, and the heartbeats of `ranks`; none until all have sent their first."""
        keys = [_key("verdict"), *map(_key, ranks)]
        if self._known.issuperset(ranks) or self._store.check(keys):
            self._known.update(ranks)
        else:
            keys = keys[:1]
        verdict, *beats = self._store.multi_get(keys)
        found = dict(zip(ranks, map(Heartbeat.from_json, beats), strict=False))
        return (None if verdict == NONE.encode() else verdict.decode()), found

    def decide(self, verdict: str) -> str:
        """Propose a verdict; return the one that counts, the first."""
        return self._store.compare_set(_key("verdict"), NONE, verdict).decode()

    def give(self, rank: int, evidence: dict[str, Any]) -> None:
        self._store.set(_key(f"evidence/{rank}"), json.dumps(evidence))
        self._store.add(_key("given"), 1)

    @property
    def given(self) -> int:
        """Number of ranks about which there is evidence."""
        return self._store.add(_key("given"), 0)

    def evidence(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return the evidence that there is by now."""
        there = [rank for rank in ranks if self._store.check([_key(f"evidence/{rank}")])]
        return {rank: json.loads(self._store.get(_key(f"evidence/{rank}"))) for rank in there}

    def release(self) -> None:
        """Tell all ranks that the stall is reported, so that they may leave."""
        self._store.set(_key("reported"), "1")

    def is_released(self) -> bool:
        return bool(self._store.check([_key("reported")]))


def _key(name: int | str) -> str:
    return f"watchdog/{name}"
