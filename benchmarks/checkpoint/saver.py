"""The process in which one contestant saves twice and loads once, beside a loop that computes.

A contestant's `save` returns when training may go on, with what to wait for. Durable is: complete, and fsynced.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
SIDE, LARGE = 2000, 33
"""33 tensors of 2000 × 2000: a model, and the two moments of Adam beside it."""
QUIET_S = 2.0


class Pending(Protocol):
    def done(self) -> bool: ...
    def wait(self) -> None: ...


class Contestant(Protocol):
    def save(self, state: State, folder: Path) -> Pending: ...
    def load(self, state: State, folder: Path) -> None: ...


class Now:
    """What was durable when `save` returned."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def make_state(count: int = LARGE) -> State:
    draws = torch.Generator().manual_seed(0)
    return {f"tensor{n:02d}": torch.randn(SIDE, SIDE, generator=draws) for n in range(count)}


def sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def step(data: Tensor) -> None:
    torch.mm(data, data)


def steps_for(condition: Callable[[], bool], data: Tensor) -> tuple[int, float]:
    """(steps, seconds) of computing as long as the condition holds."""
    count, start = 0, time.perf_counter()
    while condition():
        step(data)
        count += 1
    return count, time.perf_counter() - start


def save(contestant: Contestant, state: State, folder: Path, data: Tensor) -> dict[str, float]:
    folder.mkdir()
    start = time.perf_counter()
    pending = contestant.save(state, folder)
    blocked_s = time.perf_counter() - start
    steps, seconds = steps_for(lambda: not pending.done(), data)
    pending.wait()
    durable_s = time.perf_counter() - start
    return {"blocked_s": blocked_s, "durable_s": durable_s, "steps_per_s": steps / seconds if steps > 20 else 0.0}


def serve(make: Callable[[State], Any]) -> None:
    torch.set_num_threads(1)
    scratch, data = Path(os.environ["BENCH_SCRATCH"]), torch.randn(256, 256)
    state = make_state(int(os.environ.get("BENCH_TENSORS", LARGE)))
    contestant: Contestant = make(state)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    until = time.perf_counter() + QUIET_S
    count, seconds = steps_for(lambda: time.perf_counter() < until, data)
    quiet = count / seconds
    first = save(contestant, state, scratch / "first", data)
    until = time.perf_counter() + QUIET_S
    steps_for(lambda: time.perf_counter() < until, data)
    second = save(contestant, state, scratch / "second", data)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    blank = {name: torch.zeros_like(value) for name, value in state.items()}
    start = time.perf_counter()
    contestant.load(blank, scratch / "second")
    load_s = time.perf_counter() - start
    wrong = [name for name in state if not torch.equal(blank[name], state[name])]
    size_mb = sum(value.nbytes for value in state.values()) / 2**20
    seen = {
        "first_blocked_s": first["blocked_s"],
        "first_durable_s": first["durable_s"],
        **second,
        "rate": second["steps_per_s"] / quiet if second["steps_per_s"] else None,
        "load_s": load_s,
        "equal": not wrong,
        "extra": (peak_mb - before_mb) / size_mb,
    }
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(seen))
