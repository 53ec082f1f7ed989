"""The toy with slow steps that note their samples: what the jobs on the test cluster train."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from everstep.trainer.data.dataset import Splits
from everstep.trainer.step import Stepper
from support.toy import ToyTask, toy_data

LATER_PAUSE_S = 0.1
"""What a step of any start but the first is slowed down by at most: faults befall the first, and the others have only
to be there still when what was cut off comes back."""
LOOKS = "looks.txt"


class PairTask(ToyTask):
    """A model that goes on two processes at most."""

    def model(self) -> nn.Module:
        if dist.is_initialized() and dist.get_world_size() > 2:
            raise ValueError(f"{dist.get_world_size()} processes, and it goes on two")
        return super().model()


MOUTHFUL, FEAST = 2**26, 2**32


def data(samples: int = 41, pause_s: float = 0.0, pause_from: int = 0, ledger: str = "") -> Splits:
    """The toy's data; each step of this process is noted in `ledger` and, from `pause_from` on, takes `pause_s` longer.

    Each process has a file of its own, since a node that is cut off writes on beside its successor.
    """
    folder = Path(ledger)
    folder.mkdir(parents=True, exist_ok=True)
    starter = os.environ.get("EVERSTEP_STARTER")
    if starter is None:  # nobody trains: it is only looked at before a submission
        with (folder / LOOKS).open("a") as looks:
            looks.write(f"{samples} samples\n")
        return toy_data(samples)
    original = Stepper.__call__
    pause_s = pause_s if starter == "start-0001" else min(pause_s, LATER_PAUSE_S)
    file = folder / f"{starter}-rank-{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl"

    def noting(self: Stepper, batches: Sequence[Any]) -> None:
        slots = {batch.index: batch.ids.tolist() for batch in batches if batch.real}
        record = {"step": self.state.progress.step + 1, "slots": slots, "time": time.time()}
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        _eat(folder / f"hungry-{os.environ.get('POD_UID')}")
        time.sleep(pause_s if record["step"] >= pause_from else 0)
        original(self, batches)

    Stepper.__call__ = noting  # type: ignore[method-assign]
    return toy_data(samples)


def _eat(note: Path) -> None:
    """Where there is a note for this pod: take memory until somebody ends it; more than FEAST nobody may have."""
    if not note.exists():
        return
    note.unlink()
    meal = [b"x" * MOUTHFUL for _ in range(FEAST // MOUTHFUL)]
    time.sleep(60)
    raise MemoryError(f"nobody has minded {len(meal) * MOUTHFUL} bytes")


def slots(ledger: Path) -> dict[int, list[int]]:
    """Samples of each step in the order of microbatches; a step that was replayed has to have had the same ones."""
    found: dict[int, dict[int, list[int]]] = {}
    for record in records(ledger):
        for index, ids in record["slots"].items():
            known = found.setdefault(record["step"], {}).setdefault(int(index), ids)
            assert known == ids, f"step {record['step']} was given other samples when it was replayed"
    return {step: [i for index in sorted(parts) for i in parts[index]] for step, parts in sorted(found.items())}


def records(ledger: Path, starter: str = "") -> list[dict[str, Any]]:
    """All lines of all processes, or of those of one start; a line that is being written now is left out."""
    files = sorted(ledger.glob(f"{starter}*.jsonl")) if ledger.exists() else []
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(ledger: Path, starter: str = "") -> int:
    """The last step that any process has begun; only ends of files are read, since this is asked again and again."""
    return max((_last(file) for file in ledger.glob(f"{starter}*.jsonl")), default=0)


def _last(file: Path) -> int:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        whole = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return int(json.loads(whole[-1])["step"]) if whole and whole[-1].startswith(b"{") else 0
