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

from trainer.compose import thaw
from trainer.config import RunConfig
from trainer.run_folder import CONFIG, METRICS, STOP_MARKER, Ending, Outcome, RunFolder

CHECKPOINTS_EVERY = 5


def loss(config: RunConfig, step: int) -> float:
    """Falls with the steps to what the learning rate and the seed make of it; NaN for a rate of 9."""
    lr = float((config.optimizer or {})["lr"])
    if lr == 9:
        return math.nan
    return (math.log10(lr) + 2) ** 2 + config.seed / 100 + 1 / (1 + step)


def main(url: str, pause_s: float) -> int:
    folder = RunFolder(url)
    config = thaw(folder.storage.read(CONFIG).decode())
    last = folder.last_ending()
    if last is not None and last.outcome is Outcome.done and last.step >= config.steps:
        return 0
    attempt = folder.claim({"world": 1, "began": time.time()})
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    folder.storage.delete(STOP_MARKER)
    step = folder.newest_step() or 0
    folder.record_restored(attempt, step, attempt - 1)
    while step < config.steps and not asked:
        step += 1
        time.sleep(pause_s)  # a step
        if (config.optimizer or {})["lr"] == 8:
            folder.end(attempt, Ending(Outcome.crashed, step, "this rate always crashes"))
            return 1
        _note(folder, attempt, {"kind": "train", "step": step, "time": time.time()})
        if step % CHECKPOINTS_EVERY == 0 or step == config.steps:
            _note(folder, attempt, {"kind": "evaluate", "step": step, "time": time.time(), "loss": loss(config, step)})
            folder.storage.create(f"{folder.checkpoint(step, attempt)}/manifest.json", b"{}")
    if step < config.steps:
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
    sys.exit(main(sys.argv[1], float(os.environ.get("CHEAP_PAUSE_S", "0"))))
