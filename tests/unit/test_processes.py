"""A process is known by its PID and the time at which it started, since PIDs are reused."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from everstep.processes import created_at, has_run_since

pytestmark = pytest.mark.process


def test_a_process_has_run_since_it_began_and_not_before() -> None:
    assert has_run_since(os.getpid(), time.time())
    assert not has_run_since(os.getpid(), 1.0)  # another process had this PID then
    assert created_at(os.getpid()) is not None


def test_a_process_that_has_ended_does_not_run_even_before_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert has_run_since(child.pid, time.time())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert not has_run_since(child.pid, time.time())
    child.wait()
    assert created_at(child.pid) is None


def test_no_process_has_no_pid() -> None:
    assert not has_run_since(None, time.time())
