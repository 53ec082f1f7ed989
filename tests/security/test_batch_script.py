"""slurm/run.sbatch writes into a run folder, and through no link that somebody has left there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from everstep.launch.schedulers.slurm.sbatch import script

PROGRAMS = {
    "python3": 'case "$*" in *"decide begin"*) echo 1 ;; *"decide element"*) echo "$RUN" ;; *) echo exit 0 ;; esac',
    "srun": 'kill -USR1 $PPID; while [ ! -e "$NOTICED" ]; do :; done',
    "scancel": 'touch "$NOTICED"',
}
"""Programs that the script calls, in place of Slurm: a notice comes while the step runs."""


def started(tmp_path: Path, run: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    known = {"PATH": path, "RUN": str(run), "NOTICED": str(tmp_path / "noticed"), "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", str(script()), *(more or (str(run),))],
        env=known | {"SLURM_JOB_NUM_NODES": "1"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.process
def test_a_notice_leaves_a_stop_marker(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert started(tmp_path, run).returncode == 0
    assert (run / "stop").read_text() == "USR1\n"


@pytest.mark.process
def test_a_stop_marker_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    (run / "stop").symlink_to(victim)
    assert started(tmp_path, run).returncode == 0
    assert victim.read_text() == "mine"


@pytest.mark.process
def test_the_output_of_an_element_goes_through_no_link(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("mine")
    (run / "slurm-7_3.out").symlink_to(victim)
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert started(tmp_path, run, str(tmp_path / "list"), **element).returncode == 0
    assert victim.read_text() == "mine"
