"""The launcher's part of the config: typed, with the nearest key for a wrong one, and without secrets."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config, job_yaml, processes, threads


def test_an_empty_job_has_the_defaults() -> None:
    assert job_config({}) == JobConfig()


def test_values_come_out_typed() -> None:
    job = job_config({"nproc": 4, "grace_s": "30", "env": {"NCCL_DEBUG": "INFO"}})
    assert (job.nproc, job.grace_s, job.env) == (4, 30, {"NCCL_DEBUG": "INFO"})


def test_a_wrong_key_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no key 'job\.nprocs'; did you mean 'job\.nproc'\?"):
        job_config({"nprocs": 4})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"nproc": 0}, "job.nproc=0: must be ≥ 1 or auto"),
        ({"nproc": "all"}, "job.nproc='all': must be ≥ 1 or auto"),
        ({"max_restarts": -1}, "job.max_restarts=-1"),
        ({"grace_s": "soon"}, "job.grace_s: "),
        ({"threads": 0}, "job.threads=0"),
        ({"env": "A=1"}, "env"),
        ({"scheduler": "pbs"}, "job.scheduler='pbs': must be local"),
    ],
)
def test_a_wrong_value_is_said_in_one_line_with_its_key(node: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_config(node)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_secret_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"job\.env\.WANDB_API_KEY") as error:
        job_config({"env": {"WANDB_API_KEY": "s3cret"}})
    assert "s3cret" not in str(error.value)


def test_job_yaml_reads_back() -> None:
    job = JobConfig(nproc=2, env={"A": "1"})
    assert job_config(yaml.safe_load(job_yaml(job))) == job


def test_auto_is_one_process_for_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: H100'\necho 'GPU 1: H100'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes(JobConfig()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert processes(JobConfig()) == 1


def test_auto_is_one_process_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes(JobConfig()) == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert processes(JobConfig()) == 1


def test_a_driver_that_does_not_answer_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", hangs)
    assert processes(JobConfig()) == 1


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [threads(JobConfig(), n) for n in (1, 3, 16)] == [8, 2, 1]
    assert threads(JobConfig(threads=5), 3) == 5


def test_the_shells_thread_count_stands_unless_the_job_says_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads(JobConfig(), 2) == 7
    assert threads(JobConfig(threads=5), 2) == 5


@pytest.mark.parametrize(("text", "seconds"), [
    ("24h", 86400), ("90m", 5400), ("1d12h", 129600), ("1h30m", 5400), ("24:00:00", 86400), ("30:00", 1800),
    ("1-12", 129600), ("1-12:30", 131400), ("1-12:30:05", 131405),
])  # fmt: skip
def test_a_time_is_said_our_way_or_slurms(text: str, seconds: int) -> None:
    assert JobConfig(time=text).time_s == seconds


@pytest.mark.parametrize("text", ["90", "", "soon", "1-", "1:2:3:4", "24 h", "-1h"])
def test_any_other_time_is_refused_a_bare_number_too(text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.time=.*write 24h, 90m"):
        job_config({"time": text})


def test_a_time_that_leaves_none_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"job\.time='2m'.*must be longer than job\.grace_s \+ 30 = 150 s"):
        job_config({"time": "2m", "grace_s": 120})


@pytest.mark.parametrize(("nodes", "both"), [(4, (4, 4)), ("2:4", (2, 4)), ("3:3", (3, 3))])
def test_nodes_are_a_number_or_a_range(nodes: int | str, both: tuple[int, int]) -> None:
    assert JobConfig(nodes=nodes).node_range == both


@pytest.mark.parametrize("nodes", [0, "4:2", "0:2", "2-4", "many"])
def test_other_numbers_of_nodes_are_refused(nodes: int | str) -> None:
    with pytest.raises(ConfigError, match=r"job\.nodes="):
        job_config({"nodes": nodes})


@pytest.mark.parametrize("cause", [{"match": "("}, {"match": ""}, {"remedy": "stop"}, {"match": "x", "remedy": "pray"}])
def test_a_cause_needs_a_sound_pattern_and_a_known_remedy(cause: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        job_config({"causes": {"mine": cause}})
    assert "\n" not in str(error.value)


def test_a_secret_is_named_and_never_given() -> None:
    with pytest.raises(ConfigError, match=r"job\.secrets") as error:
        job_config({"secrets": ["WANDB_API_KEY=s3cret"]})
    assert "s3cret" not in str(error.value)
