"""Who takes part, and how one of them is run: a fresh process, one thread, a scratch folder that is gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS_PYTHON = os.environ.get("BENCH_PEERS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
TIMEOUT_S = 600.0


class MissingError(Exception):
    """The contestant's package is not there."""


class FailedError(Exception):
    """The contestant ran and did not get to the end."""


@dataclass(frozen=True)
class Contestant:
    """A script, and the package that it needs in the peers' environment."""

    name: str
    package: str | None = None
    folder: str = "benchmarks.contestants"
    peers: str = PEERS_PYTHON

    @property
    def python(self) -> str:
        return sys.executable if self.package is None else self.peers

    def check(self) -> None:
        """MissingError unless its package is there."""
        if self.package is None:
            return
        if not Path(self.python).exists():
            raise MissingError("the peers' environment is not there: benchmarks/README.md")
        found = f"import importlib.util as u, sys; sys.exit(u.find_spec({self.package!r}) is None)"
        if subprocess.run([self.python, "-c", found], check=False).returncode:
            raise MissingError(f"{self.package} is not installed")

    def argv(self, processes: int) -> list[str]:
        script = ["-m", f"{self.folder}.{self.name}"]
        if processes == 1:
            return [self.python, *script]
        return [*torchrun(self.python, processes), *script]


CONTESTANTS = (
    Contestant("plain"),
    Contestant("plain_fused"),
    Contestant("floor"),
    Contestant("everstep"),
    Contestant("fabric", "lightning"),
    Contestant("accelerate", "accelerate"),
    Contestant("lightning", "lightning"),
    Contestant("hf_trainer", "transformers"),
    Contestant("composer", "composer"),
)


def chosen(only: str, default: Sequence[str], among: Sequence[Contestant] = CONTESTANTS) -> list[Contestant]:
    names = only.split(",") if only else default
    known = {contestant.name: contestant for contestant in among}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no contestant {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def torchrun(python: str, processes: int, *options: str) -> list[str]:
    nproc = f"--nproc-per-node={processes}"
    return [python, "-m", "torch.distributed.run", "--standalone", nproc, *options]


def environment(out: Path, scratch: str, settings: Mapping[str, object]) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "BENCH_OUT": str(out),
        "BENCH_SCRATCH": scratch,
        **{f"BENCH_{name}": str(value) for name, value in settings.items()},
    }


def run(argv: Sequence[str], settings: Mapping[str, object]) -> dict[str, Any]:
    """Run to the end; gives what benchmarks/clock.py wrote, and when the process was started and had ended."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        out = Path(scratch, "out.json")
        started = time.time()
        try:
            done = subprocess.run(
                argv, cwd=ROOT, env=environment(out, scratch, settings), capture_output=True, text=True,
                timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"not done after {TIMEOUT_S:.0f} s") from error
        ended = time.time()
        # What counts is the clock's word: gloo may abort a process (exit -6) that has done all of its work.
        if not out.exists():
            raise FailedError(f"exit {done.returncode}: {done.stderr.strip()[-2000:]}")
        return {**json.loads(out.read_text()), "started": started, "wall_s": ended - started}
