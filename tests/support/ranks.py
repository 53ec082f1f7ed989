"""Real ranks on gloo, forked from the test's own process, which has imported everything already."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it when it is made
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp

import everstep.trainer.assemble  # noqa: F401
from everstep import provenance
from everstep.compose import compose
from everstep.rank_env import die_with_parent
from everstep.run_folder import RunFolder
from everstep.trainer.step import Stepper
from everstep.trainer.stop import Stop
from everstep.trainer.worker import attempt
from support import TESTS

torch.set_num_threads(1)
TIMEOUT_S = 150.0
# What every rank would do by itself after the fork: fill the parser's tables, read the metadata of all packages, and
# look at all that was imported.
compose(["experiment=toy"], [str(TESTS / "conf")])
PACKAGES = provenance.packages()
gc.collect()
gc.freeze()


@dataclass(frozen=True)
class Ranks:
    """How the ranks of one start ended: exit codes (negative: the signal) and what they printed."""

    codes: list[int]
    printed: str


def start(world: int, work: Callable[[int], int], log: Path, *, all_die: bool = False,
          meanwhile: Callable[[list[int]], None] | None = None) -> Ranks:  # fmt: skip
    """Fork `world` ranks that do `work(rank)`; with `all_die` the death of one by a signal kills all.

    `meanwhile` is called with their process ids once they run.
    """
    host, port = _host_store()
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    pids = [_fork(rank, world, port, work, log) for rank in range(world)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        if meanwhile is not None:
            meanwhile(pids)
        while len(codes) < world:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if all_die and codes[pid] < 0:
                    _kill(set(pids) - codes.keys())
            elif time.monotonic() > deadline:
                for left in set(pids) - codes.keys():
                    os.kill(left, signal.SIGABRT)  # faulthandler writes the stacks
                    os.waitpid(left, 0)
                raise TimeoutError(f"ranks still run after {TIMEOUT_S} s: {_since(log, begin)}")
            else:
                time.sleep(0.005)
    finally:
        left = {host} | set(pids) - codes.keys()
        _kill(left)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return Ranks([codes[pid] for pid in pids], _since(log, begin))


def _since(log: Path, begin: int) -> str:
    return log.read_bytes()[begin:].decode() if log.exists() else ""


def _host_store() -> tuple[int, int]:
    """A process that hosts the store, and its port. Not this one: a fork beside its thread may inherit a lock."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, f"{store.port}\n".encode())
            signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pid, int(pipe.readline())


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fork(rank: int, world: int, port: int, work: Callable[[int], int], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        die_with_parent()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")  # fmt: skip
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        faulthandler.enable(stream)
        provenance.packages = lambda: PACKAGES
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        code = work(rank)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def train(world: int, root: Path, *overrides: str, run: str = "toy", before: Callable[[int], None] | None = None,
          **options: Any) -> Ranks:  # fmt: skip
    """Train the toy (or what the overrides say) on forked ranks; `before(rank)` may lay a trap in the child."""

    def work(rank: int) -> int:
        sys.path.insert(0, str(TESTS))
        os.chdir(root)
        stop = Stop()
        stop.listen()
        record_samples(root / run, rank)
        if before is not None:
            before(rank)
        given = [text for text in overrides if text.startswith("experiment=")] or ["experiment=toy"]
        rest = [text for text in overrides if not text.startswith("experiment=")]
        where = [] if any(text.startswith("run_root=") for text in rest) else [f"run_root={root}"]
        return attempt(["--config-dir", str(TESTS / "conf"), *given, *where, f"run={run}", *rest], stop)

    return start(world, work, root / f"{run}.log", **options)


def record_samples(folder: Path, rank: int) -> None:
    """Have every step of this process note its samples beside the run: the ledger that fault tests compare."""
    original = Stepper.__call__

    def noting(self: Stepper, batches: Sequence[Any]) -> None:
        slots = {batch.index: batch.ids.tolist() for batch in batches if batch.real}
        folder.mkdir(exist_ok=True)
        with (folder / "ledger.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.state.progress.step + 1, "slots": slots}) + "\n")
        original(self, batches)

    Stepper.__call__ = noting  # type: ignore[method-assign]


def ledger(root: Path, run: str = "toy") -> dict[int, list[int]]:
    """Samples of each step in the order of microbatches; a step that was replayed has to have had the same ones."""
    slots: dict[int, dict[int, list[int]]] = {}
    for line in (root / run / "ledger.jsonl").read_text().splitlines():
        record = json.loads(line)
        for index, ids in record["slots"].items():
            known = slots.setdefault(record["step"], {}).setdefault(int(index), ids)
            assert known == ids, f"step {record['step']} was given other samples when it was replayed"
    return {step: [i for index in sorted(parts) for i in parts[index]] for step, parts in sorted(slots.items())}


def folder(root: Path, run: str = "toy") -> RunFolder:
    return RunFolder(str(root / run))


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
