"""A token of a submission names its run folder, so that no other folder can claim the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launch.schedulers.job import (
    JobHandle,
    JobState,
    JobStatus,
    is_token_of,
    new_token,
    refuse_other_job,
    token_by_hand,
)
from everstep.launch.schedulers.kubernetes.labels import token_label


@pytest.mark.parametrize("url", ["s3://bucket/runs/demo", "/runs/demo"])
def test_a_token_is_of_its_folder_and_of_no_other(url: str) -> None:
    for token in (new_token(url), token_by_hand(url)):
        assert is_token_of(token, url)
        assert not is_token_of(token, f"{url}2")
        assert not is_token_of(token, url.replace("demo", "other"))
        assert token_label(token) == token  # Kubernetes keeps it as it is
    assert new_token(url) != new_token(url)
    assert token_by_hand(url) == token_by_hand(url)


def test_the_token_of_a_sweep_is_of_its_trials() -> None:
    token = new_token("/runs/sweep")
    assert is_token_of(token, "/runs/sweep/trials/seed=1")
    assert not is_token_of(token, "/runs/other/trials/seed=1")


def test_two_names_of_one_folder_are_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert is_token_of(new_token(f"{tmp_path}/link/runs/demo"), f"{tmp_path}/real/runs/demo")


def test_a_job_of_another_folder_is_refused_and_one_that_is_gone_is_not() -> None:
    handle = JobHandle("slurm", "c", "7")
    status = JobStatus(JobState.running, token=new_token("/runs/other"))
    with pytest.raises(ConfigError, match="was not submitted for /runs/demo"):
        refuse_other_job(handle, status, "/runs/demo")
    with pytest.raises(ConfigError):
        refuse_other_job(handle, JobStatus(JobState.running), "/runs/demo")
    refuse_other_job(handle, JobStatus(JobState.unknown), "/runs/demo")
    refuse_other_job(handle, None, "/runs/demo")
