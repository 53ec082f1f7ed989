"""Small files that leave beside training: in order, the newest of each name, whatever the store does meanwhile."""

from __future__ import annotations

import threading

import pytest

from everstep.errors import StorageError
from everstep.storage import LocalStorage
from everstep.trainer.reporting import background_writer
from everstep.trainer.reporting.background_writer import BackgroundWriter
from support.processes import until


class Slow:
    """A store that lets one write through whenever it is told."""

    url = "slow://"

    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.gate = threading.Semaphore(0)
        self.fails = 0
        self.asked = 0

    def write(self, path: str, data: bytes) -> None:
        self.asked += 1
        self.gate.acquire()
        if self.fails:
            self.fails -= 1
            raise StorageError("the store is down")
        self.written.append((path, data))


def test_who_puts_never_waits_and_only_the_newest_of_a_name_goes() -> None:
    store = Slow()
    box = BackgroundWriter(store)  # type: ignore[arg-type]
    box.put("a", b"1")
    until(lambda: store.asked == 1)
    for data in (b"2", b"3"):
        box.put("b", data)
    box.put("c", b"4")
    for _ in range(3):
        store.gate.release()
    assert box.close()
    assert store.written == [("a", b"1"), ("b", b"3"), ("c", b"4")]


def test_what_changes_while_it_is_written_is_written_again() -> None:
    store = Slow()
    box = BackgroundWriter(store)  # type: ignore[arg-type]
    box.put("a", b"1")
    until(lambda: store.asked == 1)
    box.put("a", b"2")
    for _ in range(2):
        store.gate.release()
    assert box.close()
    assert store.written == [("a", b"1"), ("a", b"2")]


def test_what_a_store_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "AGAIN_S", 0.01)
    store = Slow()
    store.fails = 3
    box = BackgroundWriter(store)  # type: ignore[arg-type]
    box.put("a", b"1")
    for _ in range(4):
        store.gate.release()
    assert box.close()
    assert store.written == [("a", b"1")]


def test_what_cannot_be_written_at_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    store = Slow()
    box = BackgroundWriter(store)  # type: ignore[arg-type]
    box.put("progress.json", b"1")
    assert not box.close(timeout_s=0.05)
    assert "progress.json could not be written to slow://" in caplog.text
    store.gate.release()


def test_nothing_put_is_nothing_to_close(tmp_path: object) -> None:
    assert BackgroundWriter(LocalStorage(str(tmp_path))).close()
