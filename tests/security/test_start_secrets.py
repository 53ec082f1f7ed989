"""Processes of a local start hold only the key of their start, and no socket of the launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everstep.processes import children
from everstep.security.job_secrets import START_KEY, TOKEN
from everstep.trainer.fork_server import _control
from support import TESTS

SECRET = "planted" * 6


def test_programs_that_the_fork_server_starts_do_not_inherit_its_socket() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    with ours, _control([str(theirs.detach())]) as control:
        assert not control.get_inheritable()


def environments(pid: int) -> list[str]:
    """Return the environments of all processes below this one, as the kernel shows them to their user."""
    found = []
    for each in children(pid, recursive=True):
        try:
            found.append(Path(f"/proc/{each}/environ").read_text())
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.process
def test_no_process_of_a_local_run_has_the_token_of_jobs_or_the_key_of_an_outer_start(tmp_path: Path) -> None:
    environment = {**os.environ, TOKEN: SECRET, START_KEY: SECRET, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    words = ("run", "experiment=breast_cancer", "steps=3", "run=demo", "job.nproc=2", "parallel=ddp")
    argv = [sys.executable, "-m", "everstep.launch", *words]
    seen: list[str] = []
    with subprocess.Popen(argv, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            seen += environments(run.pid)
            time.sleep(0.02)
    assert run.returncode == 0
    trainers = [each for each in seen if "EVERSTEP_STARTER=" in each]
    assert trainers
    assert not [each for each in trainers if SECRET in each]
