"""`everstep sweep` with trials that cost no torch: the driver, its processes and all that it writes are real."""

from __future__ import annotations

import sys
from pathlib import Path

from everstep.launch.__main__ import main
from everstep.launch.sweep import workers_local
from everstep.launch.sweep.workers import Task

PROGRAM = Path(__file__).parent / "cheap_trial.py"


def command(task: Task) -> list[str]:
    return [sys.executable, str(PROGRAM), task.folder.storage.url]


if __name__ == "__main__":
    workers_local.resume_command = command  # type: ignore[assignment]
    sys.exit(main())
