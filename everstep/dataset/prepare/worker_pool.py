"""Worker pool: calls of one function in parallel, in processes or, for data in memory, in threads.

A worker is a fresh interpreter at the end of a pipe, so it shares no lock or thread with its parent, and it exits as
soon as the other end of the pipe is closed: a killed preparation leaves no process behind that still writes.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection as pipes
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, cast

from everstep.errors import DataError, EverstepError
from everstep.import_path import safe_flags

Say = Callable[[int, int], None]
Call = tuple[Any, ...]
"""Arguments of one call; `say` is added."""


def in_parallel(
    function: Callable[..., Any], calls: Sequence[Call], many: int, say: Say, threads: bool = False
) -> Generator[tuple[int, Any], None, None]:
    """Yield (number of the call, its result) as calls are done; the first error ends all and is raised."""
    many = min(many, len(calls))
    if many <= 1:
        for number, call in enumerate(calls):
            yield number, function(*call, say)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        if not threads:
            for _ in range(many):
                worker = _Worker()
                stack.callback(worker.stop)
                idle.put(worker)
        yield from _spread(function, calls, many, say, None if threads else idle)


def _spread(
    function: Callable[..., Any], calls: Sequence[Call], many: int, say: Say, idle: queue.SimpleQueue[_Worker] | None
) -> Iterator[tuple[int, Any]]:
    def one(call: Call) -> Any:
        if idle is None:
            return function(*call, say)
        worker = idle.get()
        try:
            return worker.call(function, call, say)
        finally:
            idle.put(worker)

    # Not as a context, which would wait for all calls after an error: the workers are stopped instead.
    pool = ThreadPoolExecutor(many)
    try:
        running: dict[Future[Any], int] = {}
        waiting = iter(enumerate(calls))
        while True:
            for number, call in waiting:
                running[pool.submit(one, call)] = number
                if len(running) > many:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=idle is None, cancel_futures=True)


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self) -> None:
        self._pipe, theirs = pipes.Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            [
                sys.executable,
                *safe_flags(),
                "-c",
                "from everstep.dataset.prepare.worker_pool import work; work()",
                str(theirs.fileno()),
            ],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the parent, which then closes the pipe
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"},
        )
        theirs.close()

    def call(self, function: Callable[..., Any], call: Call, say: Say) -> Any:
        """Return the function's result; raise its error."""
        try:
            self._pipe.send((function, call))
            while True:
                kind, content = self._pipe.recv()
                if kind == "done":
                    return content
                if kind == "failed":
                    raise content
                if kind == "crashed":
                    raise RuntimeError(f"in a worker process:\n{content}")
                say(*content)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            raise DataError(
                f"a worker process ended with code {code}, perhaps for lack of memory: set processes= lower"
            ) from None

    def stop(self) -> None:
        """Kill the process; an interrupted unit is repeated at the next start."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def _serve(pipe: pipes.Connection) -> None:
    """Answer calls until the other end is closed, then exit at once, also during a call."""
    calls: queue.SimpleQueue[tuple[Callable[..., Any], Call]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                calls.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        function, call = calls.get()
        try:
            answer = "done", function(*call, lambda rows, size: pipe.send(("said", (rows, size))))
        except EverstepError as error:
            answer = "failed", error
        except Exception:
            answer = "crashed", traceback.format_exc()
        pipe.send(answer)


def work() -> None:
    """Run a worker process; its one argument is the file descriptor of its pipe."""
    _serve(cast(Any, pipes.Connection)(int(sys.argv[1])))
