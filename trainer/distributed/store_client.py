"""Client of a start's store, with the interface of `torch.distributed.Store`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from everstep.rendezvous.channel import Fields
from everstep.rendezvous.store_connection import StoreConnection, StoreGoneError

_kept: list[RunStore] = []
"""All clients: torch keeps only their C++ half, which fails once the Python half is collected."""


class RunStore(Store):
    """One connection to the store; threads take turns on it, so `clone` opens another one."""

    def __init__(self, address: str, key: bytes, timeout_s: float) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout_s))
        self._address = address
        self._key = key
        self._connection = StoreConnection(address, key, timeout_s)
        _kept.append(self)

    def _ask(self, *fields: bytes, wait_s: float = 0.0) -> Fields:
        try:
            return self._connection.ask(*fields, wait_s=wait_s)
        except StoreGoneError as error:
            raise dist.DistNetworkError(str(error)) from error
        except TimeoutError as error:
            raise dist.DistStoreError(str(error)) from error

    def _seconds(self, timeout: timedelta | None = None) -> float:
        given: timedelta = self.timeout if timeout is None else timeout  # type: ignore[attr-defined]  # missing in stubs
        return given.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key.encode(), _bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        wait_s = self._seconds()
        return self._ask(b"get", str(wait_s).encode(), *(key.encode() for key in keys), wait_s=wait_s)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        pairs = zip(keys, values, strict=True)
        self._ask(b"set", *(part for key, value in pairs for part in (key.encode(), _bytes(value))))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", key.encode(), str(amount).encode())[0])

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask(b"check", *(key.encode() for key in keys))[0])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        wait_s = self._seconds(timeout)
        self._ask(b"wait", str(wait_s).encode(), *(key.encode() for key in keys), wait_s=wait_s)

    def delete_key(self, key: str) -> bool:
        return bool(self._ask(b"delete", key.encode())[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"compare", key.encode(), _bytes(expected), _bytes(desired))[0]

    def append(self, key: str, value: str | bytes) -> None:
        self._ask(b"append", key.encode(), _bytes(value))

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    # torch's C++ half calls these two by other names than Python does.
    deleteKey, getNumKeys = delete_key, num_keys

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> RunStore:
        return RunStore(self._address, self._key, self._seconds())


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
