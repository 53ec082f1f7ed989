"""The objects of the simulated control plane, with versions and a history that can be lost, as etcd's can."""

from __future__ import annotations

import copy
import datetime
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

Plain = dict[str, Any]
Fits = Callable[[Plain], bool]
Key = tuple[str, str, str]
"""Plural, namespace, name."""
TRACKING = "batch.kubernetes.io/job-tracking"


class ApiError(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Store:
    """Every change gets the next version; `changed` wakes those who watch."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version, self.forgotten = 1, 0
        self._objects: dict[Key, Plain] = {}
        self._history: list[tuple[int, str, Key, Plain]] = []

    def create(self, key: Key, thing: Plain) -> Plain:
        with self.changed:
            if key in self._objects:
                raise ApiError(409, "AlreadyExists", f'{key[0]} "{key[2]}" already exists')
            made = copy.deepcopy(thing)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            if key[1]:
                made["metadata"]["namespace"] = key[1]
            return self._keep(key, made, "ADDED")

    def get(self, key: Key) -> Plain:
        with self.changed:
            if key not in self._objects:
                raise ApiError(404, "NotFound", f'{key[0]} "{key[2]}" not found')
            return copy.deepcopy(self._objects[key])

    def has(self, key: Key) -> bool:
        with self.changed:
            return key in self._objects

    def pods_on(self, node: str) -> list[Plain]:
        """Those that hold a place there."""
        return self.list("pods", fits=lambda pod: pod["spec"].get("nodeName") == node
                         and pod["status"]["phase"] in ("Pending", "Running"))  # fmt: skip

    def put(self, key: Key, thing: Plain) -> Plain:
        """Replace; 409 when the version that `thing` was read at is not the newest."""
        with self.changed:
            old = self.get(key)
            read_at = thing["metadata"].get("resourceVersion")
            if read_at not in (None, old["metadata"]["resourceVersion"]):
                raise ApiError(409, "Conflict", f"Operation cannot be fulfilled on {key[2]!r}: it was modified")
            if thing == old:
                return old
            if thing["metadata"].get("deletionTimestamp") and self._may_go(thing):
                return self.remove(key)
            return self._keep(key, copy.deepcopy(thing), "MODIFIED")

    def remove(self, key: Key) -> Plain:
        with self.changed:
            gone = self.get(key)
            del self._objects[key]
            return self._note(key, gone, "DELETED")

    def delete(self, key: Key, grace_s: float) -> Plain:
        """Ask for removal: finalizers, and what runs on a node, hold it up."""
        with self.changed:
            thing = self.get(key)
            meta = thing["metadata"]
            if not self._runs(key, thing):
                grace_s = 0
            if "deletionTimestamp" not in meta:
                meta |= {"deletionTimestamp": now(), "deletionGracePeriodSeconds": grace_s}
            elif grace_s < meta.get("deletionGracePeriodSeconds", 0):
                meta["deletionGracePeriodSeconds"] = grace_s
            if not self._may_go(thing):
                return self._keep(key, thing, "MODIFIED")
            return self.remove(key)

    def list(self, plural: str, namespace: str = "", fits: Fits = lambda thing: True) -> list[Plain]:
        with self.changed:
            found = [
                thing
                for (kind, place, _), thing in sorted(self._objects.items())
                if kind == plural and (not namespace or place == namespace) and fits(thing)
            ]
            return copy.deepcopy(found)

    def since(
        self, version: int, plural: str, namespace: str, fits: Fits = lambda thing: True
    ) -> Iterator[tuple[int, str, Plain]]:
        """Changes after a version; also those that are forgotten: a watch that is open loses nothing."""
        with self.changed:
            # Versions are without gaps: the first change had number 2.
            found = self._history[max(0, version - 1) :]
        for number, what, key, thing in found:
            if key[0] == plural and (not namespace or key[1] == namespace) and fits(thing):
                yield number, what, thing

    def forget(self, version: int | None = None) -> None:
        """The history up to a version is gone, as after a compaction: no watch can begin at an older one."""
        with self.changed:
            self.forgotten = self.version if version is None else version

    def touch(self) -> None:
        """A change that concerns nobody: the others' versions get older."""
        with self.changed:
            self._history.append((self.version + 1, "MODIFIED", ("leases", "", ""), {"metadata": {}}))
            self.version += 1

    def _may_go(self, thing: Plain) -> bool:
        """Finalizers hold it up, and so does a node that has not said yet that the pod has ended."""
        meta = thing["metadata"]
        return not meta.get("finalizers") and not meta.get("deletionGracePeriodSeconds")

    def _runs(self, key: Key, thing: Plain) -> bool:
        return key[0] == "pods" and bool(thing["spec"].get("nodeName")) and (
            thing["status"]["phase"] in ("Pending", "Running"))  # fmt: skip

    def _keep(self, key: Key, thing: Plain, what: str) -> Plain:
        self._objects[key] = thing
        return self._note(key, thing, what)

    def _note(self, key: Key, thing: Plain, what: str) -> Plain:
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        self._history.append((self.version, what, key, copy.deepcopy(thing)))
        self.changed.notify_all()
        return copy.deepcopy(thing)


def labelled(labels: Plain) -> Fits:
    """Has these labels; of one whose value is None, any."""

    def fits(thing: Plain) -> bool:
        has = thing["metadata"].get("labels", {})
        return all(key in has and value in (None, has[key]) for key, value in labels.items())

    return fits


def key_of(thing: Plain) -> Key:
    return f"{thing['kind'].lower()}s", thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


def set_condition(thing: Plain, condition: Plain) -> None:
    """There is one of each type."""
    found = thing.setdefault("status", {}).get("conditions", [])
    thing["status"]["conditions"] = [*(each for each in found if each["type"] != condition["type"]), condition]
