"""`everstep run` with its run folder in an object store: a real S3 server on this machine, a trainer of a few lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.store_servers import S3_KEYS

pytestmark = pytest.mark.process

FAKE = """
import sys
from everstep.run_folder import RunFolder
from everstep.outcome import Ending, Outcome
folder = RunFolder(sys.argv[1])
attempt = folder.claim({})
folder.end(attempt, Ending(Outcome.crashed if attempt == 1 else Outcome.done, step=attempt * 5))
sys.exit(1)
"""

DRIVER = """
import sys
from everstep.launch import torchrun
from everstep.launch.__main__ import main
torchrun.command = lambda url, *_: [sys.executable, "-c", sys.argv[1], url]
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    experiment = tmp_path / "conf" / "experiment" / "tiny.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\ntask: {_target_: a.B}\ndata: {_target_: a.C}\n")
    return tmp_path


def everstep(project: Path, s3_server: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    fixed = ["run", "--config-dir", "conf", "experiment=tiny", "run=r", "job.nproc=1", "job.warm=false"]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, FAKE, *fixed, *words],
        env={
            **os.environ,
            **S3_KEYS,
            "AWS_ENDPOINT_URL": s3_server,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **env,
        },
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_run_in_a_bucket_crashes_restarts_and_is_done(project: Path, s3_server: str) -> None:
    ended = everstep(project, s3_server, "run_root=s3://bucket/runs", "steps=10")
    assert ended.returncode == 0, ended.stderr
    assert "starting again (1 of 3" in ended.stderr
    again = everstep(project, s3_server, "run_root=s3://bucket/runs", "steps=10")
    assert "is done: step 10 of 10 in s3://bucket/runs/r" in again.stderr
    listed = subprocess.run(["ls", str(project)], capture_output=True, text=True, check=True).stdout.split()
    assert listed == ["conf"]


def test_a_bucket_that_is_not_there_is_one_line(project: Path, s3_server: str) -> None:
    ended = everstep(project, s3_server, "run_root=s3://nosuch/runs")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "nosuch" in ended.stderr


def test_missing_credentials_are_one_line(project: Path, s3_server: str) -> None:
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "/nosuch"}
    ended = everstep(project, s3_server, "run_root=s3://bucket/other", **none)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
