"""`everstep sweep` with trials that cost no torch: the driver, its processes and all that it writes are real."""

from __future__ import annotations

import sys

from everstep.launch.__main__ import main
from everstep.launch.sweep import workers_local
from everstep.launch.sweep.workers import Task


def command(task: Task) -> list[str]:
    return [sys.executable, "-m", "support.fake_trainer", task.folder.storage.url]


if __name__ == "__main__":
    workers_local.resume_command = command  # type: ignore[assignment]
    sys.exit(main())
