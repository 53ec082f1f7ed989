"""Predictions of a command that is killed again and again on changing worlds equal those of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from support.processes import until

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]

KILLS, ROWS = 10, 1  # many small parts, so that a kill comes before the last
TRAIN = ("experiment=breast_cancer", "run=sharded", "parallel=fsdp", "precision=fp64", "steps=4", "job.nproc=2")
PREDICT = ("predict", "sharded", "--on", "train", "--rows", str(ROWS))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "everstep.launch", *words]


def undisturbed(*words: str, cwd: Path) -> None:
    ended = subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def ranks(work: str) -> list[int]:
    """Return the processes of the ranks that predict into this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if work in words and words[-1:] == [""] and "everstep.trainer.run_torchrun" not in words:
            found.append(int(process.name))
    return found


def parts(folder: Path) -> int:
    return len([*folder.glob("part-*.parquet")])


def killed_once(cut: Path, cwd: Path, world: int, more: int, chance: random.Random) -> str:
    """Kill a random rank or the launcher once so many more parts are there; return the role of the victim."""
    work, wanted = f"{cut}/_everstep", parts(cut) + more
    words = command(*PREDICT, "--out", str(cut), f"job.nproc={world}")
    process = subprocess.Popen(words, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: process.poll() is not None or (bool(ranks(work)) and parts(cut) >= wanted), 60)
    assert process.poll() is None, "the command ended before it was killed"
    role = "launcher" if chance.random() < 0.3 else "rank"
    os.kill(process.pid if role == "launcher" else chance.choice(ranks(work)), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    until(lambda: not ranks(work), 20)  # none goes on without its launcher
    return role


def rows(folder: Path) -> pa.Table:
    tables = [parquet.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(tables)


def test_predictions_after_ten_kills_on_changing_worlds_equal_undisturbed_ones_row_by_row(tmp_path: Path) -> None:
    chance = random.Random(20)
    undisturbed("run", *TRAIN, cwd=tmp_path)
    undisturbed(*PREDICT, "--out", "whole", "job.nproc=1", cwd=tmp_path)
    total, cut = parts(tmp_path / "whole"), tmp_path / "cut"
    roles = [
        killed_once(cut, tmp_path, kill % 3 + 1, chance.choice([0, 1, 3, total // 40]), chance) for kill in range(KILLS)
    ]
    assert {*roles} == {"launcher", "rank"}
    assert parts(cut) < total
    undisturbed(*PREDICT, "--out", str(cut), "job.nproc=2", cwd=tmp_path)
    whole, found = rows(tmp_path / "whole"), rows(cut)
    assert found["sample"].to_pylist() == whole["sample"].to_pylist() == [*range(len(whole))]
    assert found["label"].equals(whole["label"])
    one, other = (np.array(table["probability"].to_pylist()) for table in (whole, found))
    assert np.abs(one - other).max() <= 1e-9
