"""A proxy that makes faults, before each store, by each way to it."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator

import pytest

from everstep.storage import Storage, open_storage
from support.fault_proxy import Proxy, fault_proxy
from support.store_clients import WAYS, Way


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each way; how long obstore waits is tried on one of its stores."""
    if "way" in metafunc.fixturenames:
        waits = "impatient" in metafunc.fixturenames
        ways = [way for way in WAYS if not (waits and way.protocol == "gs")]
        metafunc.parametrize("way", ways, ids=[way.name for way in ways])


@pytest.fixture(scope="session")
def proxies(request: pytest.FixtureRequest) -> Iterator[Callable[[Way], Proxy]]:
    """A proxy before the server of a way, started when it is asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def before(server: str) -> Proxy:
            return stack.enter_context(fault_proxy(int(server.rsplit(":", 1)[1])))

        yield lambda way: before(request.getfixturevalue(f"{way.bucket}_server"))


@pytest.fixture
def proxy(
    request: pytest.FixtureRequest, way: Way, proxies: Callable[[Way], Proxy], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """Between this process, by a way to a store, and the store."""
    request.getfixturevalue(way.bucket)
    shared = proxies(way)
    shared.clear()
    monkeypatch.setenv("EVERSTEP_OBSTORE", way.obstore)
    monkeypatch.setenv(way.endpoint, shared.url)
    yield shared
    shared.clear()


@pytest.fixture
def store(way: Way, proxy: Proxy) -> Storage:
    return open_storage(f"{way.protocol}://bucket/{uuid.uuid4().hex}")
