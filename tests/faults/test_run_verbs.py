"""What the verbs say of real runs: killed, replayed, stopped from another shell, gone on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everstep.launch.runs.status import report
from everstep.run_folder import EVENTS, RunFolder
from support import TESTS, kill_points
from support.processes import until
from support.ranks import folder, train


@pytest.mark.dist
def test_goodput_of_a_run_that_was_killed_tells_what_was_done_twice(tmp_path: Path) -> None:
    killed = train(2, tmp_path, before=lambda rank: kill_points.after_evaluation(1), all_die=True)
    assert killed.codes == [-9, -9], killed.printed
    assert train(2, tmp_path).codes == [0, 0]
    told = report(folder(tmp_path))
    facts = told.facts()
    assert (facts["state"], facts["step"], facts["attempt"], facts["checkpoint_step"]) == ("done", 12, 2, 12)
    spent = facts["goodput"]
    # Killed after the evaluation of step 6, before that step was saved.
    again_from = folder(tmp_path).facts("attempts/0002/restored.json").get("step", 0)
    assert again_from < 6
    assert spent["replayed_steps"] == 6 - again_from
    assert sum(spent["parts_s"].values()) == pytest.approx(spent["wall_s"], abs=0.1)
    # Steps of a toy take less than the hundredths of a second that are printed.
    for part in ("productive", "start", "replayed", "checkpoint", "evaluation"):
        assert told.goodput.parts[part] > 0, part


@pytest.mark.dist
def test_a_trainer_writes_down_what_goodput_needs(tmp_path: Path) -> None:
    assert train(2, tmp_path).codes == [0, 0]
    run = folder(tmp_path)
    events = list(run.lines(1, EVENTS))
    kinds = [event["event"] for event in events]
    assert kinds.count("first_step") == 1
    assert kinds.index("started") < kinds.index("first_step") < kinds.index("saved")
    assert all(event["seconds"] > 0 for event in events if event["event"] in ("saved", "evaluated"))
    claim, ending = run.claim_of(1), run.ending(1)
    assert ending is not None
    assert ending.time is not None
    first = events[kinds.index("first_step")]
    assert list(first["laps_s"]) == ["import", "rendezvous", "config", "build", "load", "first step"]
    assert sum(first["laps_s"].values()) == pytest.approx(first["time"] - claim["began"], abs=0.05)
    assert claim["began"] <= claim["time"] <= events[0]["time"] <= ending.time
    # The last word is that of a save, and it does not forget how fast the run was.
    progress = run.facts("progress.json")
    assert progress["step"] == 12
    assert progress["steps_per_s"] > 0
    assert set(progress["metrics"]) == {"loss", "mae"}


def everstep(*words: str, cwd: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    return subprocess.Popen([sys.executable, "-m", "everstep.launch", *words], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def asked(*words: str, cwd: Path) -> str:
    process = everstep(*words, cwd=cwd)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return printed


def standing(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked("status", "toy", "--json", cwd=tmp_path))
    return found


@pytest.mark.process
def test_a_run_is_watched_cancelled_and_resumed_from_another_shell(tmp_path: Path) -> None:
    words = ["--config-dir", str(TESTS / "conf"), "experiment=toy", "run=toy", "job.nproc=1"]
    running = everstep("run", *words, "steps=1000000", "evaluate.every=null", "stop.poll_s=0.05", cwd=tmp_path)
    run = RunFolder(str(tmp_path / "runs" / "toy"))
    until(lambda: run.storage.exists("progress.json"), 120)
    seen = standing(tmp_path)
    assert (seen["state"], seen["attempt"]) == ("training", 1)
    assert "toy  training" in asked("ls", cwd=tmp_path)
    assert "saves and ends" in asked("cancel", "toy", cwd=tmp_path)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 75, said
    stopped = standing(tmp_path)
    assert stopped["state"] == "stopped"
    assert stopped["checkpoint_step"] == stopped["step"] > 0
    resumed = everstep("resume", "toy", "plugins=[support.toy]", f"steps={stopped['step'] + 3}", cwd=tmp_path)
    _, said = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    done = standing(tmp_path)
    assert (done["state"], done["step"], done["attempt"]) == ("done", stopped["step"] + 3, 2)
    assert done["goodput"]["replayed_steps"] == 0
    assert "saved" in asked("logs", "toy", "--attempt", "1", cwd=tmp_path)
