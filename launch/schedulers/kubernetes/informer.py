"""Mirror of all objects of one kind for repeated queries: listed once, then updated by a watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from everstep.errors import ConfigError, EverstepError
from everstep.launch.schedulers.kubernetes.client import Client, Plain, Refused

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
GONE = 410
Place = tuple[str | None, str]
"""Context and namespace."""


class Informer:
    """Mirror of one kind, updated by a thread of its own.

    A broken watch continues from the last version received; if the history since then is gone, and after any other
    refusal, all objects are listed again.

    Raises:
        ConfigError: the first list is refused.
    """

    def __init__(self, client: Client, kind: str, labels: Mapping[str, str]) -> None:
        self._client, self._kind, self._labels = client, kind, labels
        self._lock = threading.Lock()
        self._things: dict[str, Plain] = {}
        self._lost: tuple[float, str] | None = None
        """Time since which the API server has not answered, and the error."""
        self._over = threading.Event()
        self._pause = FIRST_PAUSE_S
        self._version: str | None = self._list()
        threading.Thread(target=self._follow, daemon=True).start()

    def things(self) -> list[Plain]:
        """Return all objects as last received; ConfigError without contact for the client's `retry_s`."""
        with self._lock:
            if self._lost is not None and time.monotonic() - self._lost[0] > self._client.retry_s:
                waited = f"{time.monotonic() - self._lost[0]:.0f} s"
                raise ConfigError(f"nothing has been heard of the API server for {waited}: {self._lost[1]}")
            return list(self._things.values())

    def close(self) -> None:
        """Stop the thread; it ends with its connection, and the caller does not wait for it."""
        self._over.set()

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                self._listen()
            except Refused as error:
                self._version = None
                if error.code != GONE:
                    self._miss(error)
            except (ConnectionError, EverstepError) as error:
                self._miss(error)
            self._over.wait(self._pause)
            self._pause = min(LONGEST_PAUSE_S, 2 * self._pause)

    def _listen(self) -> None:
        """Process the events of one connection, until it ends."""
        if self._version is None:
            self._version = self._list()
        with self._client.watch(self._kind, self._labels, self._version) as events:
            self._lost = None
            for what, thing in events:
                self._take(what, thing)
                if self._over.is_set():
                    return

    def _take(self, what: str, thing: Plain) -> None:
        self._version = thing["metadata"]["resourceVersion"]
        self._pause = FIRST_PAUSE_S
        if what == "BOOKMARK":  # it only carries a version
            return
        name = thing["metadata"]["name"]
        with self._lock:
            if what == "DELETED":
                self._things.pop(name, None)
            else:
                self._things[name] = thing

    def _list(self) -> str:
        found, version = self._client.listed(self._kind, self._labels)
        with self._lock:
            self._things = {each["metadata"]["name"]: each for each in found}
            self._lost = None
        return version

    def _miss(self, error: Exception) -> None:
        with self._lock:
            self._lost = self._lost or (time.monotonic(), str(error))


class Mirrors:
    """Mirrors by context, namespace and kind, each created at its first use."""

    def __init__(self, client: Callable[[Place], Client], labels: Mapping[str, str]) -> None:
        self._client, self._labels = client, labels
        self._known: dict[tuple[Place, str], Informer] = {}

    def look(self, place: Place, kind: str) -> list[Plain]:
        if (place, kind) not in self._known:
            self._known[place, kind] = Informer(self._client(place), kind, self._labels)
        return self._known[place, kind].things()

    def close(self) -> None:
        for mirror in self._known.values():
            mirror.close()
