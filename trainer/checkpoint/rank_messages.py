"""What ranks tell each other beside training: over the store, so no step ever waits for it."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import Store

from everstep.errors import CheckpointError

FIRST_LOOK_S, LONGEST_LOOK_S = 0.005, 0.1
"""Seconds between looks at the store. Its own `wait` prints a page for each time-out."""


class Meeting:
    """Every rank says one word to rank 0, and rank 0 one word to all. Without a store there is but one rank.

    The store's client lets one thread in at a time, so this has a connection of its own.
    """

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]
        self._number = 0
        self._alone = ""

    def open(self) -> None:
        """Begin the next one; all ranks have to come."""
        self._number += 1
        if self._store is not None and self.rank == 0 and self._number > 2:
            # Whoever is here now has heard the word before the last.
            self._store.delete_key(self._key("told", self._number - 2))

    def say(self, word: str) -> None:
        """What rank 0 shall know of this rank."""
        if self._store is None:
            self._alone = word
        else:
            self._store.set(self._key(self.rank), word)

    def hear(self, timeout_s: float) -> list[str]:
        """On rank 0: what each rank said; CheckpointError when one keeps silent for too long."""
        if self._store is None:
            return [self._alone]
        keys = [self._key(rank) for rank in range(self.world)]
        if not self._wait(keys, time.monotonic() + timeout_s):
            silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise CheckpointError(f"rank {silent[0]} has not written its part within {timeout_s:.0f} s")
        words = [self._store.get(key).decode() for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return words

    def tell(self, word: str) -> None:
        """Rank 0's word to all."""
        if self._store is not None:
            self._store.set(self._key("told"), word)

    def listen(self) -> str:
        """On another rank: what rank 0 tells, however long it takes; when rank 0 is gone, so is this process soon."""
        if self._store is None:
            raise RuntimeError("one rank alone has nobody to listen to")
        self._wait([self._key("told")], float("inf"))
        return str(self._store.get(self._key("told")).decode())

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Until all the keys are there; False when the deadline came first."""
        pause_s = FIRST_LOOK_S
        while self._store is not None and not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return True

    def _key(self, who: int | str, number: int | None = None) -> str:
        return f"save/{self._number if number is None else number}/{who}"
