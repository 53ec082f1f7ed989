"""Write stream that uploads while it is written."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from everstep.errors import EverstepError

Part = bytes | bytearray
Send = Callable[[bytes | Iterator[Part]], object]


class AbandonedError(EverstepError):
    """Ends an upload whose writer has failed; never raised to a caller."""


@contextlib.contextmanager
def uploading(send: Send, part_bytes: int) -> Iterator[IO[bytes]]:
    """Open a stream that uploads; the file appears when the block ends, and is discarded when it fails."""
    upload = Upload(send, part_bytes)
    try:
        yield cast(IO[bytes], upload)
    except BaseException:
        upload.abandon()
        raise
    upload.publish()


class Upload(io.RawIOBase):
    """Stream for `send`: data smaller than a part is sent at once, else in parts by a background thread.

    `send` takes bytes, or an iterator; an error of the iterator makes it discard the parts sent. A writer faster than
    the upload waits, so at most one part is buffered besides those in flight.
    """

    def __init__(self, send: Send, part_bytes: int) -> None:
        self._send, self._part_bytes = send, part_bytes
        self._buffer = bytearray()
        self._count = 0
        self._changed = threading.Condition()
        self._next: Part | None = None
        self._end: AbandonedError | StopIteration | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._over = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._count

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._count += len(view)
        start = 0
        while start < len(view):
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[start : start + room]
            start += room
            if len(self._buffer) == self._part_bytes:
                self._hand_over()
        return len(view)

    def publish(self) -> None:
        """Send the remaining bytes; the file exists when this returns."""
        if self._thread is None:
            self._send(bytes(self._buffer))
            return
        if self._buffer:
            self._hand_over()
        self._finish(StopIteration())
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Discard the upload."""
        if self._thread is not None:
            self._finish(AbandonedError())

    def _finish(self, end: AbandonedError | StopIteration) -> None:
        with self._changed:
            self._end = end
            self._changed.notify_all()
        assert self._thread is not None
        self._thread.join()

    def _hand_over(self) -> None:
        part, self._buffer = self._buffer, bytearray()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._next is None or self._over)
            if self._failure is not None:
                raise self._failure
            self._next = part
            self._changed.notify_all()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._send(self._parts())
        except BaseException as error:  # re-raised in the writer
            failure = error
        with self._changed:
            self._failure, self._over = failure, True
            self._changed.notify_all()

    def _parts(self) -> Iterator[Part]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._end is not None)
                part, self._next = self._next, None
                if part is None or isinstance(self._end, AbandonedError):
                    break
                self._changed.notify_all()
            yield part
        if isinstance(self._end, AbandonedError):
            raise self._end
