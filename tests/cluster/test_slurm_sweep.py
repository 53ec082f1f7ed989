"""Sweeps on a real Slurm: drivers and trials are killed, jobs go on, the next driver finds them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.launch.schedulers.slurm.sbatch import script
from everstep.run_folder import RunFolder
from support import PATHS, TESTS
from support.processes import until
from support.slurm.cluster import PATH, Cluster
from support.slurm.jobs import PATIENCE_S
from support.sweep_processes import FAKE, ended, ends, kill, order, results, story, sweep, told

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400), pytest.mark.usefixtures("warm")]
GRID = ["optimizer.lr=0.001,0.01,0.1", "seed=range(0,4)", "steps=20"]
PARALLEL = 6


def start(cluster: Cluster, root: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    known = ["--config-dir", str(TESTS / "conf"), "job=slurm", "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive]",
             "job.time=1h", "job.grace_s=10", "experiment=toy", "sweep.poll_s=0.5"]  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "everstep.launch", "sweep", *known, *words], cwd=root, text=True,
                            env={**cluster.env, "PYTHONPATH": PATHS, **more}, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip


def of_fakes(cluster: Cluster, root: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """The driver of trials that import no torch, and cannot be looked at before, with jobs that are real."""
    path = f"job.env.PYTHONPATH={TESTS / 'support/fake_trainer_first'}{os.pathsep}{PATHS}"
    return start(cluster, root, "--quick", "job.warm=false", path, *words, **more)


def torn(cluster: Cluster, root: Path) -> subprocess.Popen[str]:
    """12 trials, which wait after some steps while the file exists that $FAKE_TRAINER_HOLD names."""
    return of_fakes(cluster, root, *GRID, f"job.max_parallel={PARALLEL}", "run=torn",
                 FAKE_TRAINER_HOLD=str(root / "hold"), FAKE_TRAINER_PAUSE_S="0.1")  # fmt: skip


def elements(cluster: Cluster, name: str, *states: str) -> list[str]:
    """Jobs of that name as squeue lists them: an array's elements are ARRAY_N."""
    wanted = f"--states={','.join(states) or 'all'}"
    return cluster.run("squeue", "--noheader", "--array", wanted, f"--name={name}", "--format=%i").split()


def handles(root: Path, name: str) -> list[str]:
    """The jobs that the trials know of."""
    files = (root / "runs" / name / "trials").glob("*/submissions/*.handle.json")
    told = [json.loads(file.read_text())["handle"] for file in files]
    return [str(handle).rpartition("/")[2] for handle in told if handle]  # an intent that came to nothing has none


def deadly(folder: Path) -> str:
    """A PATH whose sbatch kills whoever has called it, before or after it has submitted the job."""
    folder.mkdir()
    script = folder / "sbatch"
    script.write_text(f"""#!/bin/sh
case "$* $SBATCH_KILLS" in
    *--test-only*) exec {shutil.which("sbatch")} "$@" ;;
    *after) {shutil.which("sbatch")} "$@" >/dev/null ;;
esac
kill -9 $PPID
""")
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{PATH}"


def trainers(root: Path) -> dict[str, int]:
    """Run folder → the process that trains it, on whichever node, and has claimed an attempt."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if "--frozen" in words and words[words.index("--frozen") + 1].startswith(str(root)):
                found[words[words.index("--frozen") + 1]] = int(entry.name)
    return {url: process for url, process in found.items() if RunFolder(url).attempts()}


def test_12_trials_whose_driver_and_jobs_are_killed_twice_end_like_those_of_a_sweep_that_was_left_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    ended(sweep(FAKE, tmp_path, *GRID, "run=calm", "job.max_parallel=4", "sweep.poll_s=0.05"))
    draws = random.Random(0)
    killed = 0
    hold = tmp_path / "hold"
    for results_first in sorted(draws.sample(range(1, 4), 2)):
        driver = torn(cluster, tmp_path)
        until(lambda: driver.poll() is not None or len(told(tmp_path, "torn")) >= results_first, PATIENCE_S)  # noqa: B023
        hold.touch()
        until(lambda: driver.poll() is not None or len(trainers(tmp_path)) >= PARALLEL // 2, PATIENCE_S)  # noqa: B023
        assert driver.poll() is None, driver.communicate()
        running = trainers(tmp_path)
        for url in draws.sample(sorted(running), (len(running) + 1) // 2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(running[url], signal.SIGKILL)
                killed += 1
        kill(driver)
        hold.unlink()
    ended(torn(cluster, tmp_path), seconds=PATIENCE_S)
    assert results(tmp_path, "torn") == results(tmp_path, "calm")
    assert order(tmp_path, "torn") == order(tmp_path, "calm")
    assert set(map(tuple, ends(tmp_path, "torn").values())) == {(20,)}
    assert sorted(told(tmp_path, "torn")) == [(trial, 0) for trial in range(12)]
    assert sorted(handles(tmp_path, "torn")) == sorted(elements(cluster, "torn"))
    assert len({handle.partition("_")[0] for handle in handles(tmp_path, "torn")}) == 1
    assert len(handles(tmp_path, "torn")) == 12
    assert killed >= PARALLEL // 2
    assert len(list((tmp_path / "runs/torn/trials").glob("*/attempts/*"))) > 12


def test_an_array_goes_on_without_a_driver_whenever_that_has_died(cluster: Cluster, tmp_path: Path) -> None:
    words = ["optimizer.lr=0.01,0.1", "seed=range(0,4)", "steps=20", "job.max_parallel=3", "run=alone"]
    path = deadly(tmp_path / "bin")
    for when in ("before", "after"):
        driver = of_fakes(cluster, tmp_path, *words, PATH=path, SBATCH_KILLS=when, FAKE_TRAINER_PAUSE_S="0.2")
        assert driver.wait(PATIENCE_S) == -signal.SIGKILL, driver.communicate()
        driver.communicate()
        assert handles(tmp_path, "alone") == []
        assert len(elements(cluster, "alone")) == (0 if when == "before" else 8)
    seen: list[int] = []

    def over() -> bool:
        seen.append(len(elements(cluster, "alone", "running")))
        return len(elements(cluster, "alone", "completed")) == 8

    until(over, PATIENCE_S)
    assert 1 <= max(seen) <= 3
    assert list(ends(tmp_path, "alone").values()) == [[20]] * 8
    ended(of_fakes(cluster, tmp_path, *words), seconds=PATIENCE_S)
    assert sorted(told(tmp_path, "alone")) == [(trial, 0) for trial in range(8)]
    assert sorted(handles(tmp_path, "alone")) == sorted(elements(cluster, "alone"))
    assert list(ends(tmp_path, "alone").values()) == [[20]] * 8


def test_the_script_takes_the_list_of_a_batch_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    words = ["seed=range(0,3)", "steps=20", "run=hand"]
    driver = of_fakes(cluster, tmp_path, *words, PATH=deadly(tmp_path / "bin"), SBATCH_KILLS="before")
    assert driver.wait(PATIENCE_S) == -signal.SIGKILL, driver.communicate()
    driver.communicate()
    (listed,) = (tmp_path / "runs/hand/batches").glob("*.txt")
    hand = ["sbatch", "--array=0,2%1", "--exclusive", "--job-name=by-hand", f"--output={tmp_path}/by-hand.out"]
    subprocess.run([*hand, str(script()), str(listed), "--python", sys.executable], check=True, timeout=60,
                   env={**cluster.env, "PYTHONPATH": PATHS})  # fmt: skip
    until(lambda: len(elements(cluster, "by-hand", "completed")) == 2, PATIENCE_S)
    assert list(ends(tmp_path, "hand").values()) == [[20], [], [20]]
    ended(of_fakes(cluster, tmp_path, *words), seconds=PATIENCE_S)
    assert list(ends(tmp_path, "hand").values()) == [[20], [20], [20]]
    assert len(elements(cluster, "hand")) + len(elements(cluster, story(tmp_path, "hand").trials[1].name)) == 1


def test_notice_to_one_element_requeues_that_and_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """To the one, too, whose job has the number of the whole array."""
    hold = tmp_path / "hold"
    hold.touch()
    words = ["seed=range(0,3)", "steps=20", "job.max_parallel=3", "run=requeued"]
    driver = of_fakes(cluster, tmp_path, *words, FAKE_TRAINER_HOLD=str(hold))
    trials = tmp_path / "runs/requeued/trials"
    until(lambda: len(list(trials.glob("*/checkpoints/step-00000015*"))) == 3, PATIENCE_S)
    shown = cluster.run("squeue", "--noheader", "--array", "--name=requeued", "--format=%i %A")
    array, element = next(line.split() for line in shown.splitlines() if line.startswith(f"{line.split()[1]}_"))[::-1]
    cluster.run("scancel", "--signal=USR1", "--batch", element)
    until(lambda: len(list(trials.glob("*/attempts/*"))) == 4, PATIENCE_S)
    hold.unlink()
    ended(driver, seconds=PATIENCE_S)
    causes = {json.loads(file.read_text())["job"]: file.parent.parent for file in trials.glob("*/restarts/0001.json")
              if json.loads(file.read_text())["cause"] == "preempted"}  # fmt: skip
    assert list(causes) == [element]
    assert sorted(handles(tmp_path, "requeued")) == [f"{array}_{number}" for number in range(3)]
    assert list(ends(tmp_path, "requeued").values()) == [[20]] * 3
    assert sorted(file.name for file in causes[element].glob("slurm-*.out")) == [f"slurm-{element}.out"]


def test_real_trainings_are_swept_as_jobs(cluster: Cluster, tmp_path: Path) -> None:
    words = [f"job.env.PYTHONPATH={PATHS}", "optimizer.lr=0.01,0.1", "steps=6", "job.max_parallel=2", "run=s"]
    printed = ended(start(cluster, tmp_path, *words), seconds=PATIENCE_S)
    assert "2 trials, 12 steps in all" in printed
    assert [trial.last.verdict.value for trial in story(tmp_path, "s").trials if trial.last] == ["done"] * 2
    assert list(ends(tmp_path, "s").values()) == [[6], [6]]
