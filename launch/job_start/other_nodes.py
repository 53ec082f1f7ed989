"""The other nodes of a start: a failure there ends the ranks here, and the reverse."""

from __future__ import annotations

import contextlib
import os
import threading

from everstep.errors import MachineError
from everstep.rendezvous.store_connection import StoreConnection, StoreGoneError

FAILED, DONE = b"nodes/failed", "nodes/done/{}"
WAIT_S = 60.0
"""Seconds of one request that waits for a failure."""
AWAY_S = 300.0
"""Seconds for which the store may be away; then the first node is lost."""
LOST_S = 5.0
"""Seconds for ranks to end once the store is gone, and for the head to wait for the other nodes."""


class OtherNodes:
    """Watch over the other nodes through the store of the start, in a thread.

    Args:
        join_s: seconds to wait for the store, which the first node hosts.
    """

    def __init__(self, address: str, key: bytes, node: int, nodes: int, join_s: float) -> None:
        self.wait_s: float | None = None
        """Seconds that the ranks of this node have to end, once others have failed; None until then."""
        self._address, self._key, self._node, self._nodes = address, key, node, nodes
        self._is_over = threading.Event()
        self._reading, self._writing = os.pipe()
        threading.Thread(target=self._watch, args=(join_s,), daemon=True).start()

    @property
    def descriptor(self) -> int:
        """Readable once others have failed."""
        return self._reading

    def _watch(self, join_s: float) -> None:
        try:
            found = self._await_failure(join_s)
        except (MachineError, ValueError):
            found = LOST_S
        if not self._is_over.is_set():
            self.wait_s = found
            os.write(self._writing, b".")

    def _await_failure(self, join_s: float) -> float:
        """Return the seconds that an announced failure leaves; MachineError if the store stays away."""
        while True:
            # A lost connection alone is no failure: the ranks may outlast a network that is away for a while.
            with (
                contextlib.suppress(TimeoutError, StoreGoneError),
                contextlib.closing(StoreConnection(self._address, self._key, join_s)) as store,
            ):
                return float(store.ask(b"get", str(WAIT_S).encode(), FAILED, wait_s=WAIT_S)[0])
            join_s = AWAY_S

    def announce(self, wait_s: float) -> None:
        """Tell the other nodes that a rank here has failed, and how long theirs have to end."""
        self._in_background(b"set", FAILED, str(wait_s).encode())

    def _in_background(self, *request: bytes) -> threading.Thread:
        thread = threading.Thread(target=self._ask, args=request, daemon=True)
        thread.start()
        return thread

    def _ask(self, *request: bytes) -> None:
        with (
            contextlib.suppress(StoreGoneError, MachineError, TimeoutError),
            contextlib.closing(StoreConnection(self._address, self._key, LOST_S)) as store,
        ):
            store.ask(*request, wait_s=LOST_S)

    def leave(self) -> None:
        """Say that all ranks here have ended; the first node, which hosts the store, waits for the others."""
        self._is_over.set()
        self._in_background(b"set", DONE.format(self._node).encode(), b"1").join(LOST_S)
        if self._node == 0:
            keys = [DONE.format(node).encode() for node in range(self._nodes)]
            self._in_background(b"wait", str(LOST_S).encode(), *keys).join(LOST_S)
