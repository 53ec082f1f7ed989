"""Settings mounted into a pod: the run's config and job, for a run folder that has none yet.

A manifest may be applied by hand, without a launcher that has prepared the run folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from everstep.run_folder import CONFIG, JOB, SUBMISSIONS, RunFolder

SETTINGS = "EVERSTEP_SETTINGS"
"""Environment variable: folder where the settings are mounted."""
PROGRAM = "program.json"


def settle(folder: RunFolder, environment: Mapping[str, str]) -> None:
    """Copy the mounted settings into the run folder; existing files, as of a later submission, stay."""
    mounted = Path(environment.get(SETTINGS, ""))
    if SETTINGS not in environment or not (mounted / PROGRAM).is_file():
        return
    for name in (CONFIG, JOB):
        if (mounted / name).is_file() and not folder.storage.exists(name):
            folder.storage.create(name, (mounted / name).read_bytes())
    if not folder.storage.names(SUBMISSIONS):
        # Without a handle: a launcher that needs it finds the job by its token.
        program = json.loads((mounted / PROGRAM).read_text())
        facts = {"scheduler": "k8s", "token": program["token"], "argv": program["argv"], "code": None,
                 "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}  # fmt: skip
        folder.storage.create(f"{SUBMISSIONS}/0001.json", (json.dumps(facts) + "\n").encode())
