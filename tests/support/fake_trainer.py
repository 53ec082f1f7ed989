"""A trial that costs no torch: claims, counts steps, keeps what a trainer keeps, and may be killed at any moment.

The loss is a function of the config alone, so a sweep that was disturbed must end with the same numbers.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from everstep.outcome import Ending, Outcome
from everstep.run_folder import CONFIG, METRICS, STOP_MARKER, RunFolder

CHECKPOINTS_EVERY = 5
HELD_AT = 15
"""The step after which a trial waits for as long as the file exists that $FAKE_TRAINER_HOLD names."""


def loss(config: dict[str, Any], step: int) -> float:
    """Falls with the steps to what the learning rate and the seed make of it; NaN for a rate of 9."""
    lr = float(config["optimizer"]["lr"])
    if lr == 9:
        return math.nan
    return (math.log10(lr) + 2) ** 2 + config["seed"] / 100 + 1 / (1 + step)


def main(url: str) -> int:
    folder = RunFolder(url)
    # Not by way of RunConfig, which would take most of the time that a trial takes.
    config = yaml.load(folder.storage.read(CONFIG), Loader=yaml.CSafeLoader)
    steps, pause_s = int(config["steps"]), float(os.environ.get("FAKE_TRAINER_PAUSE_S", "0"))
    last = folder.last_ending()
    if last is not None and last.outcome is Outcome.done and last.step >= steps:
        return 0
    attempt = folder.claim({"world": 1, "began": time.time()})
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))
    folder.storage.delete(STOP_MARKER)
    step = folder.newest_step() or 0
    folder.record_restored(attempt, step, attempt - 1)
    while step < steps and not asked:
        step += 1
        time.sleep(pause_s)  # a step
        if config["optimizer"]["lr"] == 8:
            folder.end(attempt, Ending(Outcome.crashed, step, "this rate always crashes"))
            return 1
        _note(folder, attempt, {"kind": "train", "step": step, "time": time.time()})
        if step % CHECKPOINTS_EVERY == 0 or step == steps:
            _note(folder, attempt, {"kind": "evaluate", "step": step, "time": time.time(), "loss": loss(config, step)})
            folder.storage.create(f"{folder.checkpoint(step, attempt)}/manifest.json", b"{}")
        while step == HELD_AT and not asked and Path(os.environ.get("FAKE_TRAINER_HOLD", "/nowhere")).exists():
            time.sleep(0.01)
    if step < steps:
        folder.storage.create(f"{folder.checkpoint(step, attempt)}/manifest.json", b"{}")
        folder.end(attempt, Ending(Outcome.preempted, step, "SIGTERM"))
        return Outcome.preempted.exit_code
    folder.end(attempt, Ending(Outcome.done, step))
    return 0


def _note(folder: RunFolder, attempt: int, record: dict[str, object]) -> None:
    path = folder.storage.path(folder.attempt(attempt, METRICS))
    assert path is not None
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
