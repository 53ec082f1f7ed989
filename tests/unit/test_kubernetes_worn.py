"""Pods that Kubernetes lets wait for long before it starts them again: a new job would go on sooner."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from everstep.launch.schedulers.kubernetes.job_status import COUNTED, IGNORED, standing


def pod(index: int, phase: str, failures: int = 0, ended_s_ago: float = 0.0) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    ended = {"finishedAt": (now - datetime.timedelta(seconds=ended_s_ago)).isoformat()}
    return {
        "metadata": {
            "name": f"demo-{index}-{failures}",
            "annotations": {
                "batch.kubernetes.io/job-completion-index": str(index),
                IGNORED: str(failures),
                COUNTED: "0",
            },
        },
        "spec": {"nodeName": f"node-{index}"},
        "status": {
            "phase": phase,
            "containerStatuses": [{"state": {"terminated": ended} if phase == "Failed" else {"running": {}}}],
        },
    }


def job() -> dict[str, Any]:
    return {"kind": "Job", "metadata": {"name": "demo"}, "spec": {}, "status": {"active": 2}}


@pytest.mark.parametrize(
    ("failures", "ended_s_ago", "is_worn"), [(3, 0, False), (4, 0, True), (4, 100, False), (9, 9, True)]
)
def test_a_job_is_worn_while_a_lost_pod_waits_longer_than_the_limit(
    failures: int, ended_s_ago: float, is_worn: bool
) -> None:
    lost = [pod(1, "Failed", number, 1000) for number in range(failures)]
    status = standing(job(), [pod(0, "Running"), *lost, pod(1, "Failed", failures, ended_s_ago)], 120)
    assert status.worn.startswith("pod 1: is started again only in ") == is_worn
    assert ("everstep resume makes a new job" in status.reason) == is_worn


def test_a_pod_that_runs_again_leaves_no_job_worn() -> None:
    status = standing(job(), [pod(0, "Running"), pod(1, "Failed", 8), pod(1, "Running", 9)], 120)
    assert status.worn == ""
    assert "would be started again only after 10 min" in status.reason


def test_a_job_that_is_over_is_not_worn() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
    ended = {**job(), "status": {"conditions": [failed]}}
    assert standing(ended, [pod(0, "Failed", 9)], 120).worn == ""
