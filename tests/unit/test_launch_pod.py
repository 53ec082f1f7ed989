"""What a pod is told, who its fellows are, and what a disruption costs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from everstep.launch.config import JobConfig
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import NodeReport, Start
from everstep.launch.node import pod as module
from everstep.launch.node.pod import Leave, Pod
from everstep.launch.node.pod_membership import PodMember, PodMembership
from everstep.launch.restart.job_policy import Action, Evidence, judge
from everstep.launch.submit.job_spec import JobSpec, settle
from everstep.launch.submit.submission import submissions
from everstep.outcome import Ending, Outcome
from everstep.run_folder import CONFIG, JOB, STOP_MARKER, RunFolder

ENVIRONMENT = {"EVERSTEP_JOB": "demo-1", "JOB_COMPLETION_INDEX": "2", "POD_IP": "10.1.2.3"}
HOSTS = ("pod-0.1", "pod-1.1")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def pod(folder: RunFolder, signals: Signals, index: int, nodes: int | str = 2) -> Pod:
    allocation = Allocation.of({**ENVIRONMENT, "JOB_COMPLETION_INDEX": str(index)})
    return Pod(
        folder, allocation, JobSpec(JobConfig(nodes=nodes, scheduler="k8s"), ("-m", "everstep.trainer")), signals
    )


def test_the_pods_environment_is_read() -> None:
    found = Allocation.of(ENVIRONMENT)
    assert (found.scheduler, found.job, found.rank, found.address) == ("k8s", "demo-1", 2, "10.1.2.3")


def test_the_newest_pod_of_an_index_is_the_member(folder: RunFolder) -> None:
    members = PodMembership(folder, "demo-1")
    assert [members.join(index, {}) for index in (0, 1, 1)] == [PodMember(0, 1), PodMember(1, 1), PodMember(1, 2)]
    assert members.current() == {0: PodMember(0, 1), 1: PodMember(1, 2)}
    assert PodMembership(folder, "demo-2").current() == {}


def test_a_start_begins_when_all_are_there_and_index_0_begins_it(folder: RunFolder) -> None:
    with Signals() as signals:
        head = pod(folder, signals, 0)
        assert head._look(0) is None
        assert Start.numbers(folder) == []
        other = pod(folder, signals, 1)
        assert other._look(0) is None
        assert Start.numbers(folder) == []
        folder.storage.write(STOP_MARKER, b"old")
        assert head._look(0) is None
        for each in (head, other):
            start = each._look(0)
            assert start is not None
            assert (start.number, tuple(start.facts["hosts"])) == (1, HOSTS)
        assert not folder.storage.exists(STOP_MARKER)


def test_fewer_than_could_be_begin_after_a_while(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Signals() as signals:
        head = pod(folder, signals, 0, "1:2")
        assert head._look(0) is None
        assert Start.numbers(folder) == []
        monkeypatch.setattr(module, "GATHER_S", 0.0)
        head._look(0)
        start = Start.newest(folder)
        assert start is not None
        assert start.facts["hosts"] == ["pod-0.1"]


def test_one_that_has_not_said_how_it_ended_is_waited_for(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_S", 0.0)
    with Signals() as signals:
        head, _ = pod(folder, signals, 0), pod(folder, signals, 1)
        head._look(0)
        start = Start.newest(folder)
        assert start is not None
        start.report(NodeReport("pod-0.1", code=1))
        head._judge(start, 1)
        assert head._look(start.number) is None
        assert Start.numbers(folder) == [1]
        successor = pod(folder, signals, 1)
        head._look(start.number)
        newest = Start.newest(folder)
        assert newest is not None
        assert newest.facts["hosts"] == ["pod-0.1", successor.me.host]


def test_what_is_left_of_a_replaced_pod_leaves(folder: RunFolder) -> None:
    with Signals() as signals:
        old = pod(folder, signals, 1)
        pod(folder, signals, 1)
        with pytest.raises(Leave, match="has been replaced") as left:
            old._look(0)
    assert left.value.code == 75


@pytest.mark.parametrize(("exit_code", "left"), [(0, 0), (2, 78), (75, 78)])
def test_all_pods_leave_as_index_0_has_decided(folder: RunFolder, exit_code: int, left: int) -> None:
    with Signals() as signals:
        head, other = pod(folder, signals, 0), pod(folder, signals, 1)
        head._look(0)
        folder.record_restart({"start": 1, "job": "demo-1", "action": "exit", "exit_code": exit_code, "reason": "so"})
        for each in (head, other):
            with pytest.raises(Leave, match="so") as error:
                each._look(1)
            assert error.value.code == left


def test_after_a_signal_a_pod_leaves_neither_with_0_nor_with_78(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (0, 78):

        def ends(folder: RunFolder, spec: str, signals: Signals, code: int = code) -> tuple[int, str]:
            signal.raise_signal(signal.SIGTERM)
            return code, "done"

        monkeypatch.setattr(module, "_run", ends)
        assert module.main([folder.url, "--spec", "d"]) == 143


def test_a_pod_that_waits_and_is_told_to_go_leaves_with_143(folder: RunFolder) -> None:
    with Signals() as signals:
        waiting = pod(folder, signals, 1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Leave) as left:
            waiting.run()
    assert left.value.code == 143


def test_a_disruption_costs_nothing_of_the_budget() -> None:
    evidence = Evidence(code=1, disrupted=True, spent=3, hosts=HOSTS, reports=(NodeReport("pod-0.1", code=1),))
    verdict = judge(evidence, {}, 3)
    assert (verdict.action, verdict.cause, verdict.restarts) == (Action.again, "lost", 3)
    assert verdict.reason == "pod-1.1 was taken away, the last checkpoint stands; starting again when all are there"
    saved = Evidence(ending=Ending(Outcome.preempted, 7), noticed=True, disrupted=True, hosts=HOSTS)
    assert judge(saved, {}, 0).cause == "preempted"


def test_what_is_final_is_final_although_a_pod_was_taken_away() -> None:
    for outcome, code in ((Outcome.done, 0), (Outcome.config_error, 2)):
        evidence = Evidence(ending=Ending(outcome, 7), disrupted=True, noticed=True, hosts=HOSTS)
        assert (judge(evidence, {}, 3).action, judge(evidence, {}, 3).exit_code) == (Action.exit, code)


def test_a_manifest_that_was_applied_by_hand_makes_its_folder(folder: RunFolder, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / CONFIG).write_text("steps: 5\n")
    (mounted / JOB).write_text("scheduler: k8s\nnodes: 3\n")
    (mounted / "program.json").write_text(json.dumps({"argv": ["-m", "everstep.trainer"], "token": "t", "run": "demo"}))
    for _ in range(2):
        settle(folder, {"EVERSTEP_SETTINGS": str(mounted)})
    assert JobSpec.read(folder).argv == ("-m", "everstep.trainer")
    assert JobSpec.read(folder).job.nodes == 3
    assert [(each.token, each.is_settled) for each in submissions(folder)] == [("t", False)]
    folder.storage.write(CONFIG, b"steps: 9\n")
    settle(folder, {"EVERSTEP_SETTINGS": str(mounted)})
    assert folder.storage.read(CONFIG) == b"steps: 9\n"


@pytest.mark.parametrize("arguments", [[], ["runs/a"], ["runs/a", "runs/b"]])
def test_a_pod_without_one_run_folder_says_so_and_is_not_tried_again(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(arguments) == module.DO_NOT_RETRY
    (line,) = capsys.readouterr().err.splitlines()
    assert f"RUN_FOLDER --spec DIGEST; it was given {len(arguments)} words" in line
