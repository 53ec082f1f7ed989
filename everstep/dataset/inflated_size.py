"""Bytes that the compressed buffers of an Arrow IPC file declare, read before Arrow allocates them.

Arrow decompresses all buffers of a record batch when it reads the batch, and takes the size of each from the file: a
kilobyte can declare terabytes. PyArrow does not show these sizes, so they are read here from the file's Flatbuffers
(Message.fbs, File.fbs and Schema.fbs of Arrow).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

END = b"ARROW1"
BLOCK_BYTES, BUFFER_BYTES = 24, 16
MOST_BUFFERS = 1 << 20
VERSION_5 = 4
"""Number of the first version of messages that names a compression in its record batches."""
RECORD_BATCH = 3
"""Number of the type of a message with a record batch."""
Bytes = memoryview


@dataclass(frozen=True)
class _Table:
    """A table of a Flatbuffer: its fields by number. Positions outside of the data raise struct.error."""

    data: Bytes
    at: int

    def place(self, number: int) -> int | None:
        """Return the position of a field; None if it is missing."""
        known = self.at - _int("<i", self.data, self.at)
        slot = 4 + 2 * number
        offset = _int("<H", self.data, known + slot) if slot < _int("<H", self.data, known) else 0
        return self.at + offset if offset else None

    def value(self, number: int, form: str) -> int:
        place = self.place(number)
        return 0 if place is None else _int(form, self.data, place)

    def table(self, number: int) -> _Table | None:
        place = self.place(number)
        return None if place is None else _root(self.data, place)

    def items(self, number: int, size: int) -> Iterator[int]:
        """Yield the positions of the structs in a vector."""
        place = self.place(number)
        if place is None:
            return
        start = place + _int("<I", self.data, place)
        if (count := _int("<I", self.data, start)) > MOST_BUFFERS:
            raise ValueError(f"a list of {count} items (limit {MOST_BUFFERS})")
        yield from range(start + 4, start + 4 + count * size, size)


def _root(data: Bytes, at: int) -> _Table:
    return _Table(data, at + _int("<I", data, at))


def _int(form: str, data: Bytes, at: int) -> int:
    if at < 0:  # unpack_from would count from the end
        raise ValueError(f"a position of {at}")
    value: int = struct.unpack_from(form, data, at)[0]
    return value


def inflated_bytes(data: Bytes) -> int:
    """Return the sum of the sizes that the compressed buffers of a file declare; 0 if none is compressed.

    Raises:
        ValueError: the file is damaged, or has dictionaries, which no shard needs.
    """
    try:
        if bytes(data[-len(END) :]) != END:
            raise ValueError("not an Arrow file")
        size = _int("<i", data, len(data) - len(END) - 4)
        footer = _root(data, len(data) - len(END) - 4 - size)
        if any(True for _ in footer.items(2, BLOCK_BYTES)):
            raise ValueError("it has dictionaries")
        return sum(_of_batch(data, block) for block in footer.items(3, BLOCK_BYTES))
    except struct.error as error:
        raise ValueError(f"a position outside of the file ({error})") from None


def _of_batch(data: Bytes, block: int) -> int:
    """Return the declared bytes of one record batch, given the position of its block in the footer."""
    start, metadata = _int("<q", data, block), _int("<i", data, block + 8)
    message = _root(data, start + (8 if _int("<i", data, start) == -1 else 4))
    if message.value(1, "<B") != RECORD_BATCH or (batch := message.table(2)) is None:
        raise ValueError("a message that is no record batch")
    if message.value(0, "<h") < VERSION_5 and message.place(4) is not None:
        raise ValueError("a message of a version that may hide a compression in its metadata")
    if batch.place(3) is None:
        return 0
    body = start + metadata
    return sum(_of_buffer(data, body, buffer) for buffer in batch.items(2, BUFFER_BYTES))


def _of_buffer(data: Bytes, body: int, buffer: int) -> int:
    offset, length = _int("<q", data, buffer), _int("<q", data, buffer + 8)
    return max(0, _int("<q", data, body + offset)) if length else 0  # -1: stored as it is
