"""Sweeps as a user starts them, and what they have left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from everstep.launch.sweep.leaderboard import ranked
from everstep.launch.sweep.plan import Plan, load
from everstep.launch.sweep.state import SweepState
from everstep.launch.sweep.sweep_folder import SweepFolder
from everstep.outcome import Outcome
from everstep.run_folder import RunFolder
from support import TESTS

FAKE = [sys.executable, "-m", "support.sweep_of_fake_trainers"]
REAL = [sys.executable, "-m", "everstep.launch"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]), **more}


def sweep(program: list[str], cwd: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """`everstep sweep` of the toy, under way."""
    known = ["sweep", "--config-dir", str(TESTS / "conf"), "experiment=toy", *words]
    return subprocess.Popen([*program, *known], cwd=cwd, env=environment(**more), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 120) -> str:
    """What it printed, once it has ended with this code."""
    printed, said = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    return printed + said


def asked(cwd: Path, *words: str) -> str:
    """What another verb prints."""
    done = subprocess.run([*REAL, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan(cwd: Path, name: str) -> Plan:
    return load(SweepFolder(str(cwd / "runs" / name)))


def story(cwd: Path, name: str) -> SweepState:
    return SweepFolder(str(cwd / "runs" / name)).story()


def order(cwd: Path, name: str) -> list[str]:
    """The trials as they stand on the leaderboard."""
    return [row.trial.name for row in ranked(plan(cwd, name), story(cwd, name))]


def results(cwd: Path, name: str) -> dict[str, Any]:
    """Trial → verdict and values, to the bit."""
    return {trial.name: [(rung, told.verdict.value, [value.hex() for value in told.values], told.step)
                         for rung, told in sorted(trial.told.items())]
            for trial in story(cwd, name).trials}  # fmt: skip


def ends(cwd: Path, name: str) -> dict[str, list[int]]:
    """Trial → the steps at which attempts of it have ended as done."""
    found: dict[str, list[int]] = {}
    for trial in story(cwd, name).trials:
        run = RunFolder(str(cwd / "runs" / name / "trials" / trial.name))
        endings = [run.ending(number) for number in run.attempts()]
        found[trial.name] = [each.step for each in endings if each is not None and each.outcome is Outcome.done]
    return found


def told(cwd: Path, name: str) -> list[tuple[int, int]]:
    """Trial and rung of every result that was written down."""
    files = sorted((cwd / "runs" / name / "records").glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    return [(record["trial"], record["rung"]) for record in records if record["event"] == "told"]


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []
