"""What pods ask their run folder while they wait and while they train: a hundred of them do it on one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.launch.config import JobConfig
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import NodeReport, Start
from everstep.launch.node.pod import POLL_REMOTE_S, POLL_S, Pod, Watch, poll_s
from everstep.launch.submit.job_spec import JobSpec
from everstep.run_folder import RunFolder
from support.counting_storage import Counted, counted

PODS = 3
LISTS = ["names members/demo-1", "names starts"]


@pytest.fixture
def signals() -> Iterator[Signals]:
    with Signals() as made:
        yield made


def pod(root: Path, signals: Signals, index: int) -> tuple[Pod, Counted]:
    """In a process of its own as far as the folder goes."""
    folder = RunFolder(str(root / "run"))
    environment = {"EVERSTEP_JOB": "demo-1", "JOB_COMPLETION_INDEX": str(index), "POD_IP": f"10.1.2.{index}"}
    job = JobConfig(nodes=PODS, scheduler="k8s")
    made = Pod(folder, Allocation.of(environment), JobSpec(job, ("-m", "everstep.trainer")), signals)
    return made, counted(folder)


def begun(root: Path, signals: Signals) -> tuple[Pod, Counted, Pod, Counted, Start]:
    """Index 0 and 1 of a start that has begun with all pods."""
    head, head_calls = pod(root, signals, 0)
    other, calls = pod(root, signals, 1)
    pod(root, signals, 2)
    assert head._look(0) is None
    start = other._look(0)
    assert start is not None
    return head, head_calls, other, calls, start


def test_a_pod_that_trains_lists_two_folders(tmp_path: Path, signals: Signals) -> None:
    head, head_calls, other, calls, start = begun(tmp_path, signals)
    for each, asked in ((head, head_calls), (other, calls)):
        asked.since()
        Watch(each, start)._look()
        assert asked.since() == LISTS


def test_a_pod_that_waits_for_the_first_start_lists_two_folders(tmp_path: Path, signals: Signals) -> None:
    for index in (0, 1):
        waiting, calls = pod(tmp_path, signals, index)
        calls.since()
        assert waiting._look(0) is None
        assert sorted(set(calls.since())) == LISTS


def test_a_pod_that_waits_for_a_successor_reads_each_decision_and_report_once(tmp_path: Path, signals: Signals) -> None:
    head, head_calls, other, calls, start = begun(tmp_path, signals)
    for number in range(20):
        head.folder.record_restart({"start": number - 100, "job": "demo-1", "action": "again"})
    for host in start.facts["hosts"][:2]:
        start.report(NodeReport(host, code=1))
    other._look(1)
    calls.since()
    other._look(1)
    assert calls.since() == [*LISTS, "names restarts"]
    head.folder.record_restart({"start": 1, "job": "demo-1", "action": "again", "reason": "a peer was lost"})
    for each, asked, expected in ((head, head_calls, [*LISTS, "names starts/0001"]), (other, calls, LISTS)):
        each._look(1)
        asked.since()
        assert each._look(1) is None
        assert [call.rstrip("/") for call in asked.since()] == expected


def test_a_store_is_asked_less_often_than_a_disk(tmp_path: Path) -> None:
    assert poll_s(RunFolder(str(tmp_path))) == POLL_S
    assert poll_s(RunFolder("memory://run")) == POLL_REMOTE_S
    assert POLL_REMOTE_S >= 5 * POLL_S
