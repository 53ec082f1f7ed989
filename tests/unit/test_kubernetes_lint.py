"""What an API server would accept though it cannot work is said in one line, with the key to change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from everstep.errors import ConfigError
from everstep.launch.config import job_config
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.kubernetes.manifest import objects
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from everstep.launch.schedulers.kubernetes.validate import mistakes

PROGRAM = Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), "everstep-1", "steps: 5\n")
KEYS: dict[str, Any] = {"scheduler": "k8s", "nodes": 3, "nproc": 2, "gpus": 0, "image": "i", "mem": "16G"}
Change = Callable[[list[dict[str, Any]]], Any]


def found(program: Program = PROGRAM, change: Change = lambda made: None, **keys: Any) -> list[str]:
    job = job_config({**KEYS, **keys})
    made = copy.deepcopy(objects(job, program))
    change(made)
    return mistakes(job, program, made)


def pod(made: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = made[-1]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_nothing_stands_against_a_sound_job(kind: str) -> None:
    assert found(kind=kind) == []


@pytest.mark.parametrize(("keys", "said"), [
    ({"image": None}, "change job.image"),
    ({"image": "none"}, "change job.image"),
    ({"secrets": ["WANDB_API_KEY"]}, "job.k8s.secret must name the Secret"),
    ({"nproc": "auto", "gpus": "auto"}, "set job.nproc or job.gpus"),
    ({"mem": "4G"}, "change job.k8s.shm_gb or job.mem"),
    ({"partition": "gpu"}, "job.partition='gpu': has no meaning on Kubernetes"),
    ({"k8s": {"queue_priority": "high"}}, "has no effect without job.queue"),
])  # fmt: skip
def test_keys_that_cannot_work_together_are_said(keys: dict[str, Any], said: str) -> None:
    assert any(said in line for line in found(**keys)), found(**keys)


def rules(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = made[-1]["spec"]["podFailurePolicy"]["rules"]
    return found


CHANGES: list[tuple[Change, str]] = [
    (lambda made: made[-1]["spec"].update(parallelism=2), "parallelism=2 and completions=3"),
    (
        lambda made: made[-1]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[300]),
        "exit code 300",
    ),
    (lambda made: made[-1]["spec"]["podFailurePolicy"]["rules"].reverse(), "DisruptionTarget must be the first"),
    (lambda made: pod(made).update(terminationGracePeriodSeconds=30), "must be ≥ job.grace_s + 30 = 90"),
    (lambda made: pod(made)["containers"][0].update(name="other"), "no container 'train' any more"),
    (lambda made: pod(made)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "refuses hostPath"),
    (lambda made: made[1]["spec"].update(selector={"app": "other"}), "ours have no such label"),
    (lambda made: made[-1]["metadata"].update(name="x" * 62), "give a shorter run="),
    (lambda made: made[0]["data"].update({"big": "x" * (1 << 20)}), "a ConfigMap holds 1048576"),
    (lambda made: made[0]["data"].update({"config.yaml": "url: s3://me:pw12@host"}), "looks like a secret"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_what_an_overlay_can_break_is_said(change: Change, said: str) -> None:
    assert any(said in line for line in found(change=change)), found(change=change)


def test_a_folder_on_this_machines_disk_is_seen_by_pods_only_through_a_claim() -> None:
    program = Program("demo", "/runs/demo", (), "everstep-1")
    assert any("pods do not see this machine's disk" in line for line in found(program))
    assert any(
        "no volume is mounted above it (/data)" in line for line in found(program, k8s={"claims": {"c": "/data"}})
    )
    assert found(program, k8s={"claims": {"c": "/runs"}}) == []


def test_what_is_rendered_says_what_is_wrong_with_it_and_nobody_is_asked() -> None:
    job = job_config({**KEYS, "image": None})
    rendered = Kubernetes(job).render(job, Program("demo", "s3://runs/demo", (), "everstep-1"))
    assert rendered.mistakes == ("job.image=None: every pod needs an image; change job.image",)


@pytest.mark.parametrize(("keys", "said"), [
    ({"kind": "pod"}, "job.kind='pod': must be job, jobset, trainjob"),
    ({"k8s": {"run_as_user": 0}}, "job.k8s.run_as_user=0: must be ≥ 1"),
    ({"k8s": {"secret": "Bad_Name"}}, "job.k8s.secret='Bad_Name'"),
])  # fmt: skip
def test_a_key_with_a_wrong_value_is_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        job_config({**KEYS, **keys})
    assert said in str(error.value)
