"""A stream goes up in parts beside its writer, in little memory, and leaves nothing when it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import IO

import pytest

from everstep.storage.upload_stream import AbandonedError, uploading

PART = 100


class Sink:
    """Takes what is sent; with `limit`, fails after so many parts; with a gate, waits for it before each part."""

    def __init__(self, limit: int = 10**6, gate: threading.Semaphore | None = None) -> None:
        self.limit, self.gate = limit, gate
        self.parts: list[bytes] = []
        self.whole: bytes | None = None
        self.ended: BaseException | None = None

    def send(self, data: bytes | Iterator[bytes]) -> None:
        if isinstance(data, bytes):
            self.whole = data
            return
        try:
            for part in data:
                if self.gate is not None:
                    assert self.gate.acquire(timeout=20)
                self.parts.append(part)
                if len(self.parts) == self.limit:
                    raise ConnectionError("the store is gone")
            self.whole = b"".join(self.parts)
        except BaseException as error:
            self.ended = error
            raise


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 10 * PART, 10 * PART + 7])
@pytest.mark.parametrize("step", [1, 33, 1000])
def test_what_was_written_is_sent_in_order(size: int, step: int) -> None:
    data, sink = bytes(i % 251 for i in range(size)), Sink()
    with uploading(sink.send, PART) as stream:
        for start in range(0, size, step):
            assert stream.write(data[start : start + step]) == len(data[start : start + step])
        assert stream.tell() == size
    assert sink.whole == data
    assert all(len(part) == PART for part in sink.parts[:-1])


def test_any_buffer_is_taken_and_may_be_used_again() -> None:
    sink, buffer = Sink(), bytearray(b"a" * 250)
    with uploading(sink.send, PART) as stream:
        stream.write(memoryview(buffer).cast("H"))
        buffer[:] = b"b" * 250
        stream.write(buffer)
    assert sink.whole == b"a" * 250 + b"b" * 250


def test_a_writer_waits_for_a_slow_store_with_one_part_in_its_hands() -> None:
    gate = threading.Semaphore(0)
    sink, written = Sink(gate=gate), 0

    def write() -> None:
        nonlocal written
        with uploading(sink.send, PART) as stream:
            for _ in range(20):
                stream.write(b"x" * PART)
                written += 1

    thread = threading.Thread(target=write)
    thread.start()
    for done in range(20):
        # One part is being sent, one waits, one is about to be handed over.
        assert written <= done + 3
        gate.release()
    thread.join(20)
    assert sink.whole == b"x" * 20 * PART


def fail_after(stream: IO[bytes], size: int) -> None:
    stream.write(b"x" * size)
    raise KeyError


def test_an_error_of_the_writer_throws_away_what_was_sent() -> None:
    for size in (1, 5 * PART):
        sink = Sink()
        with pytest.raises(KeyError), uploading(sink.send, PART) as stream:
            fail_after(stream, size)
        assert sink.whole is None
        assert size == 1 or isinstance(sink.ended, AbandonedError)


@pytest.mark.parametrize("more", [0, 50])
def test_an_error_of_the_store_comes_out_of_the_stream(more: int) -> None:
    sink = Sink(limit=2)
    with pytest.raises(ConnectionError, match="the store is gone"), uploading(sink.send, PART) as stream:
        stream.writelines([b"x" * PART] * (2 + more))
    assert sink.whole is None
    assert not [thread for thread in threading.enumerate() if thread.name == "upload"]
