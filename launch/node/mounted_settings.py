"""What a pod was given beside its image: the run's config and job, for a run folder that has none yet.

A manifest may be applied by hand, with no launcher that has prepared the folder.
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
"""Environment variable: the folder where they are mounted."""
PROGRAM = "program.json"


def settle(folder: RunFolder, environment: Mapping[str, str]) -> None:
    """Create-only, so what stands in the folder stays: a later submission may have changed it."""
    mounted = Path(environment.get(SETTINGS, ""))
    if SETTINGS not in environment or not (mounted / PROGRAM).is_file():
        return
    for name in (CONFIG, JOB):
        if (mounted / name).is_file() and not folder.storage.exists(name):
            folder.storage.create(name, (mounted / name).read_bytes())
    if not folder.storage.names(SUBMISSIONS):
        # Without a handle: whoever asks finds the job by its token.
        program = json.loads((mounted / PROGRAM).read_text())
        facts = {"scheduler": "k8s", "token": program["token"], "argv": program["argv"], "code": None,
                 "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}  # fmt: skip
        folder.storage.create(f"{SUBMISSIONS}/0001.json", (json.dumps(facts) + "\n").encode())
