"""What a contestant does, and the process that measures it: `serve(Reader)` ends each contestant's script.

A process does one thing, told by BENCH_PHASE: `write` the dataset, `read` an epoch, `stop` at 40 % of one and save the
position, or `resume` there. What it saw goes to BENCH_OUT.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.data.source import Source, load
from everstep.process_setup import keep_freed_memory, spare_what_lives

STOP_AT = 0.4
"""Of the epoch, where it is left and entered again."""
COMPARED = 5
"""Batches after it that have to be the same."""


class Joined(NamedTuple):
    """Samples of bytes in one buffer."""

    values: Any
    offsets: Any


Batch = Tensor | list[bytes] | Joined
"""Memory of the batch's own, never views of a map: tokens are int64 [b, 1024], bytes come in either form."""


class Writer(Protocol):
    """A form in which datasets are stored."""

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        """Store the samples in an empty folder."""


class Reader(Writer, Protocol):
    """One shuffled epoch of a dataset, `batch` samples at a time (the last may be smaller or left out)."""

    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        """`state` is None at the start of the epoch, else what `state()` gave in another process."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> Any:
        """The position after the batches that were taken; anything that can be pickled."""


def serve(reader: type[Reader]) -> None:
    """Do what the environment asks for."""
    phases = {"write": _write, "read": _read, "stop": _stop, "resume": _resume}
    _tell(partial(phases[os.environ["BENCH_PHASE"]], reader))


def serve_writer(writer: type[Writer]) -> None:
    """The same for one that is only written: nobody asks it for more."""
    _tell(partial(_write, writer))


def _tell(phase: Callable[[], dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    # For everybody: else a look of the collector at all of torch falls into some contestants' short epochs.
    keep_freed_memory()
    spare_what_lives()
    seen = phase()
    seen["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(seen))
    # Helper threads and processes of some peers keep the interpreter waiting; what they know is written.
    sys.stdout.flush()
    os._exit(0)


def _write(writer: type[Writer]) -> dict[str, Any]:
    source = load(_kind(), Path(os.environ["BENCH_SOURCE"]))
    source.values.max()
    folder = _folder()
    with tempfile.TemporaryDirectory() as elsewhere:
        # What a format imports at its first use says nothing of its rate.
        writer.write(source.first(64), Path(elsewhere))
    start = time.perf_counter()
    writer.write(source, folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    return {"write_mb_s": source.values.nbytes / seconds / 1e6, "stored_mb": sum(f.stat().st_size for f in files) / 1e6}


def _read(reader: type[Reader]) -> dict[str, Any]:
    _warm()
    start = time.perf_counter()
    batches = iter(reader(_folder(), _kind(), _batch(), None))
    next(batches)
    first = now = time.perf_counter()
    cpu, deadline = time.process_time(), first + float(os.environ["BENCH_SECONDS"])
    samples = 0
    for batch in batches:
        samples += _size(batch)
        now = time.perf_counter()
        if now > deadline:
            break
    cpu = time.process_time() - cpu
    return {"first_s": first - start, "samples_per_s": samples / (now - first), "cpu_us": cpu / samples * 1e6}


def _stop(reader: type[Reader]) -> dict[str, Any]:
    """Save the position at 40 %; say which samples come after it, and how far apart neighbours were on the way."""
    samples = int(os.environ["BENCH_SAMPLES"])
    opened = reader(_folder(), _kind(), _batch(), None)
    batches = iter(opened)
    seen: list[int] = []
    while len(seen) < int(STOP_AT * samples):
        seen += ids_of(next(batches))
    Path(os.environ["BENCH_STATE"]).write_bytes(pickle.dumps(opened.state()))
    if len(set(seen)) < len(seen):
        raise ValueError(f"{len(seen) - len(set(seen))} of {len(seen)} samples came twice")
    jump = float(np.abs(np.diff(seen)).mean()) / samples
    return {"jump": jump, "following": [ids_of(batch) for batch in islice(batches, COMPARED)]}


def _resume(reader: type[Reader]) -> dict[str, Any]:
    _warm()
    state = pickle.loads(Path(os.environ["BENCH_STATE"]).read_bytes())
    start = time.perf_counter()
    batches = iter(reader(_folder(), _kind(), _batch(), state))
    first = next(batches)
    seconds = time.perf_counter() - start
    return {"resume_s": seconds, "following": [ids_of(batch) for batch in [first, *islice(batches, COMPARED - 1)]]}


def ids_of(batch: Batch) -> list[int]:
    """The numbers with which the samples begin."""
    if isinstance(batch, Tensor):
        return (batch[:, 0] + (batch[:, 1] << 16)).tolist()
    if isinstance(batch, list):
        return [int.from_bytes(sample[:8], "little") for sample in batch]
    values: NDArray[np.uint8] = np.asarray(batch.values)
    return [int.from_bytes(values[start : start + 8].tobytes(), "little") for start in batch.offsets[:-1].tolist()]


def _size(batch: Batch) -> int:
    return len(batch.offsets) - 1 if isinstance(batch, Joined) else len(batch)


def _warm() -> None:
    """Read every file of the dataset once, so that the page cache holds it for everybody."""
    for file in _folder().rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 20):
                    pass


def _folder() -> Path:
    return Path(os.environ["BENCH_FOLDER"])


def _kind() -> str:
    return os.environ["BENCH_KIND"]


def _batch() -> int:
    return int(os.environ["BENCH_BATCH"])
