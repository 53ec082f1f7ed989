"""Messages between ranks outside training: over the store, so that no step waits for them."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import Store

from everstep.errors import CheckpointError

FIRST_LOOK_S, LONGEST_LOOK_S = 0.005, 0.1
"""Seconds between two checks of the store. Its own `wait` prints a page for each time-out."""


class Meeting:
    """Exchange of one message from every rank to rank 0, and one from rank 0 to all.

    Without a store there is only one rank. The store's client admits one thread at a time, so this has its own
    connection.
    """

    def __init__(self, store: Store | None, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]
        self._number = 0
        self._alone = ""

    def open(self) -> None:
        """Begin the next exchange; all ranks must take part."""
        self._number += 1
        if self._store is not None and self.rank == 0 and self._number > 2:
            # A rank that takes part in this exchange has received the message before the last, so its key can go.
            self._store.delete_key(self._key("told", self._number - 2))

    def say(self, word: str) -> None:
        """Send this rank's message to rank 0."""
        if self._store is None:
            self._alone = word
        else:
            self._store.set(self._key(self.rank), word)

    def hear(self, timeout_s: float) -> list[str]:
        """Receive on rank 0 the message of each rank.

        Raises:
            CheckpointError: a rank has sent none within `timeout_s`.
        """
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
        """Broadcast rank 0's message to all ranks."""
        if self._store is not None:
            self._store.set(self._key("told"), word)

    def listen(self) -> str:
        """Receive rank 0's message on another rank, without a time limit.

        If rank 0 dies, this process soon ends too.
        """
        if self._store is None:
            raise RuntimeError("one rank alone has nobody to listen to")
        self._wait([self._key("told")], float("inf"))
        return str(self._store.get(self._key("told")).decode())

    def _wait(self, keys: list[str], deadline: float) -> bool:
        """Wait until all the keys exist; False if the deadline passed first."""
        pause_s = FIRST_LOOK_S
        while self._store is not None and not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return True

    def _key(self, who: int | str, number: int | None = None) -> str:
        return f"save/{self._number if number is None else number}/{who}"
