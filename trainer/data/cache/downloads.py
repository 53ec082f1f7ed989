"""Download threads for parts of shards: urgent parts first, hedged if slow, retried if damaged.

A part is requested once per process (a table) and, unless a process hangs, once per node (claims of the folder).
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Protocol

from everstep.errors import DataError
from everstep.storage import Buffer

HEDGE_S = 0.5
"""Time until a second request, or HEDGE_FACTOR times the median of recent downloads if that is longer."""
HEDGE_FACTOR = 4
FIRST_HEDGE_S = 2.0
"""Time until a second request while too few downloads are done to know the median."""
HEDGES = 3
"""Second requests for one part, each after twice the time of the previous one."""
REPEATS = 2
"""Repeated downloads of a part whose bytes do not match the index."""
ELSEWHERE_S = 0.005
"""Seconds between two checks for a part that another process downloads."""
TAKE_OVER_S = 20.0
"""Seconds after which the process of a claim counts as hung; a killed one loses its claim at once."""


class DamagedError(Exception):
    """The downloaded bytes are not the part; a second download may succeed."""


class Piece(Protocol):
    """A piece to download."""

    @property
    def key(self) -> Hashable: ...
    def here(self) -> bool: ...
    def claim(self) -> bool:
        """True if this process is now the one that downloads the piece."""
        ...

    def release(self) -> None: ...
    def download(self) -> Buffer:
        """Return the verified bytes; raise DamagedError if they do not match."""
        ...

    def keep(self, data: Buffer) -> None: ...
    def end(self) -> None:
        """End the piece: no thread waits for it any more, though a late request may still be pending."""
        ...

    def damaged(self, why: str) -> DataError:
        """Return the error for a piece that stays damaged."""
        ...


@dataclass
class Stats:
    """Counts of a process's downloads."""

    downloads: int = 0
    bytes: int = 0
    hedges: int = 0
    retries: int = 0
    evictions: int = 0


@dataclass(eq=False)
class _Job:
    piece: Piece
    urgent: bool
    future: Future[None] = field(default_factory=Future)
    claimed: bool = False
    elsewhere_since: float = 0.0
    requests: int = 0
    hedges: int = 0
    damages: int = 0


@dataclass(eq=False)
class _Request:
    job: _Job
    since: float = field(default_factory=time.monotonic)
    doubled: bool = False


class DownloadPool:
    """Up to `parallel` download threads of one process; they start with the first piece and are daemons."""

    def __init__(self, parallel: int) -> None:
        self.stats = Stats()
        self._parallel = parallel
        self._changed = threading.Condition()
        self._jobs: dict[Hashable, _Job] = {}
        self._queue: list[tuple[bool, int, _Job]] = []  # a heap: urgent jobs first, each kind in its order
        self._elsewhere: deque[tuple[float, _Job]] = deque()
        self._requests: set[_Request] = set()
        self._threads = 0
        self._watched = False
        self._order = itertools.count()
        self._seconds: deque[float] = deque(maxlen=32)

    def fetch(self, pieces: Sequence[Piece], urgent: bool) -> list[Future[None]]:
        """Return a future per piece; a pending piece is not requested again, but may become urgent."""
        with self._changed:
            futures = [self._enter(piece, urgent) for piece in pieces]
            self._staff()
        return futures

    def _enter(self, piece: Piece, urgent: bool) -> Future[None]:
        job = self._jobs.get(piece.key)
        if job is None:
            job = self._jobs[piece.key] = _Job(piece, urgent)
            job.future.set_running_or_notify_cancel()
            self._push(job)
        elif urgent and not job.urgent:
            job.urgent = True
            self._push(job)  # a second entry; the thread that takes the later one finds the job done or begun
        return job.future

    def forget(self, pieces_of: Callable[[Piece], bool]) -> None:
        """Cancel the futures of those pieces that match `pieces_of` and have not begun."""
        with self._changed:
            dropped = [job for job in self._jobs.values() if pieces_of(job.piece) and not job.claimed]
            for job in dropped:
                self._end(job, CancelledError())
            if dropped:  # entries in the queue keep the files of their shard open
                self._queue = [entry for entry in self._queue if not entry[2].future.done()]
                heapq.heapify(self._queue)

    def _push(self, job: _Job, first: bool = False) -> None:
        number = next(self._order)
        heapq.heappush(self._queue, (not (job.urgent or first), -number if first else number, job))
        self._changed.notify_all()

    def _staff(self) -> None:
        """Start as many threads as the queue needs, up to the limit."""
        wanted = min(self._parallel, len(self._queue) + len(self._requests))
        if not self._watched and wanted:
            self._watched = True
            threading.Thread(target=self._watch, name="cache-watch", daemon=True).start()
        while self._threads < wanted:
            self._threads += 1
            threading.Thread(target=self._serve, name="cache-fetch", daemon=True).start()

    # ------------------------------------------------------------------------------------------------ threads

    def _serve(self) -> None:
        while not self._serve_one():  # ends once another thread replaces this one, whose request was hedged
            pass

    def _serve_one(self) -> bool:
        # In a frame of its own: a waiting thread must not keep the files of its last piece open.
        request = self._next()
        self._answer(request)
        with self._changed:
            self._requests.discard(request)
            return request.doubled

    def _next(self) -> _Request:
        with self._changed:
            while (request := self._pop()) is None:
                self._changed.wait(self._elsewhere[0][0] - time.monotonic() if self._elsewhere else None)
            self._requests.add(request)
            self._changed.notify_all()
            return request

    def _pop(self) -> _Request | None:
        while self._elsewhere and self._elsewhere[0][0] <= time.monotonic():
            self._push(self._elsewhere.popleft()[1])
        while self._queue:
            job = heapq.heappop(self._queue)[2]
            if not job.future.done() and job.requests <= job.hedges:
                job.requests += 1
                return _Request(job)
        return None

    def _answer(self, request: _Request) -> None:
        job = request.job
        try:
            if job.piece.here():
                self._finish(request)
            elif self._may_download(job):
                data = job.piece.download()
                if not job.future.done():
                    job.piece.keep(data)
                self._finish(request, len(data))
            else:
                self._come_back(job)
        except DamagedError as error:
            self._repeat(job, error)
        except Exception as error:  # passed on, with its traceback, to the caller that waits for the piece
            self._fail(job, error)

    def _may_download(self, job: _Job) -> bool:
        with self._changed:
            if job.claimed:
                return True
            if job.future.done():
                return False
            job.claimed = job.piece.claim()
            now = time.monotonic()
            job.elsewhere_since = job.elsewhere_since or now
            return job.claimed or now - job.elsewhere_since > max(TAKE_OVER_S, HEDGE_FACTOR * self._slow_s())

    def _come_back(self, job: _Job) -> None:
        with self._changed:
            job.requests -= 1
            self._elsewhere.append((time.monotonic() + ELSEWHERE_S, job))
            self._changed.notify_all()

    def _finish(self, request: _Request, count: int | None = None) -> None:
        with self._changed:
            if count is not None:
                # Late downloads count too; otherwise a link that is slow for all requests would appear fast.
                self._seconds.append(time.monotonic() - request.since)
                self.stats.downloads += 1
                self.stats.bytes += count
            self._end(request.job)

    def _repeat(self, job: _Job, error: DamagedError) -> None:
        with self._changed:
            job.damages += 1
            if job.damages <= REPEATS:
                self.stats.retries += 1
                job.requests -= 1
                self._push(job, first=True)
                return
        self._fail(job, job.piece.damaged(str(error)))

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._changed:
            job.requests -= 1
            if job.requests == 0 or isinstance(error, DataError):  # another request may still succeed
                self._end(job, error)

    def _end(self, job: _Job, error: BaseException | None = None) -> None:
        if self._jobs.get(job.piece.key) is not job:
            return
        del self._jobs[job.piece.key]
        if job.claimed:
            job.piece.release()
        job.piece.end()
        if error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(error)

    # ----------------------------------------------------------------------------------------- slow requests

    def _watch(self) -> None:
        with self._changed:
            while True:
                self._changed.wait(0.1 if self._requests else None)
                self._double_slow()

    def _double_slow(self) -> None:
        slow = self._slow_s()
        for request in list(self._requests):
            self._double(request, slow)

    def _slow_s(self) -> float:
        if len(self._seconds) < 4:
            return FIRST_HEDGE_S
        return max(HEDGE_S, HEDGE_FACTOR * statistics.median(self._seconds))

    def _double(self, request: _Request, slow: float) -> None:
        """Hedge a slow request: send a second one from a new thread that replaces the waiting one."""
        job, waited = request.job, time.monotonic() - request.since
        if request.doubled or job.future.done() or waited < slow * 2**job.hedges or job.hedges == HEDGES:
            return
        doubled = [request.job.future.done() for request in self._requests if request.doubled]
        # If many requests are slow at once the link is saturated, and more requests would only slow it further.
        if doubled.count(False) >= max(1, self._parallel // 4) or len(doubled) >= self._parallel:
            return
        request.doubled = True
        self._threads -= 1
        job.hedges += 1
        self.stats.hedges += 1
        self._push(job, first=True)
        self._staff()
