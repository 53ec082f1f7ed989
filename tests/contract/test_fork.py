"""A store that was used before a fork works in parent, child and grandchild: each makes clients of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from everstep.storage import FsspecStorage, ObstoreStorage, Storage

pytestmark = pytest.mark.process


@pytest.fixture(params=[("s3", FsspecStorage), ("s3", ObstoreStorage), ("gcs", ObstoreStorage)])
def store(request: pytest.FixtureRequest) -> Storage:
    bucket, kind = request.param
    made: Storage = kind(f"{request.getfixturevalue(bucket)}/{uuid.uuid4().hex}")
    return made


def in_child(work: Callable[[], bool]) -> bool:
    """Whether `work` is true in a forked process; one that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    return done[1] == 0


def test_a_fork_opens_a_client_of_its_own(store: Storage) -> None:
    store.write("file", b"data")

    def stream() -> bool:
        with store.writer("big") as file:
            file.write(b"x" * 20_000_000)
        return store.read("file") == b"data" and store.create("claim", b"child")

    assert in_child(stream)
    assert store.size("big") == 20_000_000
    assert not store.create("claim", b"parent")
    assert in_child(lambda: in_child(lambda: in_child(lambda: store.names() == ["big", "claim", "file"])))


def test_many_threads_of_a_child_begin_at_once(store: Storage) -> None:
    store.write("file", b"data")

    def read(_: int) -> bool:
        return store.read("file") == b"data"

    def work() -> bool:
        with ThreadPoolExecutor(12) as pool:
            return all(pool.map(read, range(12)))

    for _ in range(3):
        assert in_child(work)


def test_children_of_a_parent_that_is_busy_with_the_store_do_not_wait_for_it(store: Storage) -> None:
    store.write("file", b"data")
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            store.read("file")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert in_child(lambda: store.read("file") == b"data")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert store.read("file") == b"data"
