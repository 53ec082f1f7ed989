"""Why pods are missing: only events of the job tell it, and only while they are news."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from everstep.launch.schedulers.job import JobState
from everstep.launch.schedulers.kubernetes.job_status import lacks_pods, standing

BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
QUOTA = ('Error creating: pods "demo-1-x7k2p" is forbidden: exceeded quota: team, '
         "requested: requests.nvidia.com/gpu=8, "
         "used: requests.nvidia.com/gpu=16, limited: requests.nvidia.com/gpu=16")  # fmt: skip


def at(seconds: float) -> str:
    return (BEGAN + datetime.timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def job(**spec: Any) -> dict[str, Any]:
    return {"kind": "Job", "metadata": {"name": "demo", "uid": "u", "creationTimestamp": at(0)},
            "spec": {"parallelism": 2, **spec}, "status": {"startTime": at(0)}}  # fmt: skip


def pod(phase: str, made_s: float = 1, name: str = "demo-0") -> dict[str, Any]:
    return {"metadata": {"name": name, "creationTimestamp": at(made_s)}, "spec": {"nodeName": "n0"},
            "status": {"phase": phase}}  # fmt: skip


def event(message: str = QUOTA, last_s: float = 60, uid: str = "u", **fields: Any) -> dict[str, Any]:
    return {"reason": "FailedCreate", "message": message, "lastTimestamp": at(last_s), "involvedObject": {"uid": uid},
            **fields}  # fmt: skip


def reason(*events: dict[str, Any], pods: list[dict[str, Any]] | None = None) -> str:
    return standing(job(), pods or [], events=events).reason


def test_a_quota_is_said_with_its_name_and_all_numbers() -> None:
    assert reason(event()) == (
        "waits for quota team (requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=16, "
        "limited: requests.nvidia.com/gpu=16)"
    )


def test_another_refusal_is_said_as_it_is() -> None:
    said = 'pods "demo-0-x" is forbidden: failed quota: team: must specify requests.memory for: train'
    assert reason(event(f"Error creating: {said}")) == f"no pod can be made: {said}"


def test_a_job_of_which_some_pods_run_says_it_too() -> None:
    status = standing(job(), [pod("Running")], events=[event()])
    assert status.state is JobState.running
    assert status.reason.startswith("waits for quota team")


def test_a_job_whose_pods_are_done_does_not_wait_again_before_it_is_complete() -> None:
    assert standing(job(), [pod("Succeeded")]).state is JobState.running


def test_a_refusal_is_old_news_when_a_pod_was_made_since() -> None:
    assert reason(event(last_s=60), pods=[pod("Running", made_s=61)]) == ""


def test_the_last_time_of_a_series_counts() -> None:
    series = event(last_s=60, series={"lastObservedTime": at(90)})
    assert "quota" in reason(series, pods=[pod("Running", made_s=70)])


@pytest.mark.parametrize("other", [event(uid="another"), event(reason="SuccessfulCreate")])
def test_events_of_other_jobs_and_of_other_things_say_nothing(other: dict[str, Any]) -> None:
    assert reason(other) == "no pod runs yet"


@pytest.mark.parametrize(("made", "pods", "now_s", "lacks"), [
    (job(), [], 60, True),
    (job(), [pod("Running")], 60, True),
    (job(), [pod("Running"), pod("Pending")], 60, False),
    (job(), [pod("Running"), pod("Succeeded")], 60, False),
    (job(), [], 1, False),
    (job(suspend=True), [], 60, False),
    ({**job(), "status": {}}, [], 60, False),
    ({**job(), "status": {"startTime": at(0), "conditions": [{"type": "Failed", "status": "True"}]}}, [], 60, False),
], ids=["none", "one", "all", "one is done", "just begun", "suspended", "not begun", "failed"])  # fmt: skip
def test_only_a_job_that_should_have_more_pods_is_worth_a_question(
    made: dict[str, Any], pods: list[dict[str, Any]], now_s: float, lacks: bool
) -> None:
    assert lacks_pods(made, pods, BEGAN.timestamp() + now_s) is lacks
