"""What runs on a node: what it learns from its environment, its checks, and where it meets the others."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from everstep.errors import ConfigError, StorageError
from everstep.launch.config import JobConfig
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.output_capture import KEPT_LINES, Output
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import NodeReport, Start
from everstep.launch.node import checks, token
from everstep.launch.node.agent import Node, free_port
from everstep.launch.node.checks import BadNode, address, failures, storage
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.submit.snapshot import node_folder, take
from everstep.launch.torchrun import Rendezvous, agent
from everstep.run_folder import RunFolder
from everstep.security.job_secrets import start_key

SLURM = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n2",
         "SLURM_NODEID": "1"}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def test_slurms_environment_is_read() -> None:
    assert Allocation.of(SLURM) == Allocation("slurm", "12", 2, "n2", ("n1", "n2", "n3"), 1)
    assert Allocation.of({**SLURM, "SLURM_STEP_NODELIST": "n1"}).hosts == ("n1", "n2", "n3")


def test_without_a_scheduler_there_is_one_node() -> None:
    here = Allocation.of({})
    assert (here.scheduler, here.hosts, here.rank) == ("local", (socket.gethostname(),), 0)


def test_the_interface_gives_the_address() -> None:
    assert address("lo") == "127.0.0.1"


def test_an_interface_that_is_not_there_is_said_with_those_that_are() -> None:
    with pytest.raises(BadNode, match=r"no interface ib7 with an IPv4 address \(there are .*change job.interface"):
        address("ib7")


def test_a_name_that_leads_back_to_the_node_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    local = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: local)
    with pytest.raises(BadNode, match=r"the address 127\.0\.1\.1; set job\.interface"):
        address(None)


def test_a_run_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadNode, match="cannot be used"):
        storage(RunFolder(str(tmp_path / "file/run")), "n1")


def test_a_good_node_has_nothing_to_say_and_leaves_nothing(folder: RunFolder) -> None:
    assert failures(JobConfig(gpus=0, interface="lo"), folder, "n1", 2) == []
    assert folder.storage.names("starts") == []


def test_a_check_that_hangs_is_a_failure_and_does_not_hang(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(checks, "storage", lambda *_: threading.Event().wait())
    found = failures(JobConfig(gpus=0, check_s=1), folder, "n1", 1)
    assert found == ["a check did not end within job.check_s=1 s (a file server that hangs, or a device)"]


def test_gpus_that_are_asked_for_and_not_there_are_a_failure(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert failures(JobConfig(gpus=2, nproc=2), folder, "n1", 1) == ["2 GPUs were asked for, and 0 can be seen"]


ALONE = {"EVERSTEP_RUN_TOKEN": "t" * 32}


def test_the_nodes_of_a_job_share_the_token_that_its_scheduler_brought(folder: RunFolder) -> None:
    start = Start.claim(folder, Allocation.of(SLURM), None)
    assert token.offer(start, ALONE) == token.receive(start, ALONE) == "t" * 32
    assert "token" not in folder.storage.names("starts/0001")
    with pytest.raises(ConfigError, match=r"EVERSTEP_RUN_TOKEN has 5 letters .at least 32.; use openssl rand -hex 32"):
        token.offer(start, {"EVERSTEP_RUN_TOKEN": "short"})


def test_without_one_the_head_keeps_a_token_in_the_run_folder_that_only_this_user_reads(folder: RunFolder) -> None:
    first, second = (Start.claim(folder, Allocation.of(SLURM), None) for _ in range(2))
    made = token.offer(first, {})
    file = folder.storage.path("starts/0001/token")
    assert file is not None
    assert file.stat().st_mode & 0o777 == 0o600
    assert token.receive(first, {}) == made != token.offer(second, {})


@pytest.mark.parametrize("spoil", ["mode", "owner", "link"])
def test_a_token_that_others_could_have_written_or_read_is_refused(folder: RunFolder, spoil: str) -> None:
    start = Start.claim(folder, Allocation.of(SLURM), None)
    token.offer(start, {})
    file = folder.storage.path("starts/0001/token")
    assert file is not None
    if spoil == "mode":
        file.chmod(0o644)
    elif spoil == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file to another user")
        os.chown(file, 65534, 65534)
    else:
        file.rename(file.with_name("other"))
        file.symlink_to("other")
    with pytest.raises((ConfigError, OSError), match=r"cannot trust it|Too many levels of symbolic links"):
        token.receive(start, {})


def test_a_folder_that_can_keep_no_secret_is_refused_in_a_line() -> None:
    start = Start.claim(RunFolder("memory://runs/a"), Allocation.of(SLURM), None)
    for ask in (token.offer, token.receive):
        with pytest.raises(ConfigError, match=r"EVERSTEP_RUN_TOKEN is not set, and .*/a is no folder that only you"):
            ask(start, {})


def test_a_token_that_reached_the_head_alone_is_missed_in_a_line(folder: RunFolder) -> None:
    start = Start.claim(folder, Allocation.of(SLURM), None)
    token.offer(start, ALONE)
    with pytest.raises(ConfigError, match="EVERSTEP_RUN_TOKEN reaches the head node only"):
        token.receive(start, {})


def test_the_processes_get_the_key_of_their_start_and_not_the_token(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_START", "1")
    monkeypatch.setenv("EVERSTEP_RUN_TOKEN", "t" * 32)
    job = JobSpec(JobConfig(interface="lo", nproc=2), ("-m", "everstep.trainer"), None)
    with Signals() as signals:
        start = Start.claim(folder, Allocation.of(SLURM), None)
        start.announce("10.0.0.1:20012", 2)
        node = Node(folder, Allocation.of(SLURM), job, signals)
        meeting = node._meet()
    assert meeting == Rendezvous(3, "10.0.0.1:20012", 1, "12.2.1")
    env = node.environment(1)
    assert env["EVERSTEP_START_KEY"] == start_key("t" * 32, "12.2.1") != start_key("t" * 32, "12.2.2")
    assert "t" * 32 not in str(env) + str(agent(["mine.py"], 2, 60, meeting))


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = free_port("12", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert free_port("12", "127.0.0.1") != first
    assert free_port("12", "127.0.0.1") == first


def test_the_agents_of_a_start_meet_under_a_name_that_no_other_start_has() -> None:
    argv = agent(["mine.py", "--lr", "1"], 8, 60, Rendezvous(4, "10.0.0.1:20012", 2, "12.2.5"))
    assert {"--nnodes=4", "--rdzv-endpoint=10.0.0.1:20012", "--rdzv-id=12.2.5"} <= set(argv)
    assert "--rdzv-conf=rank=2,join_timeout=600,program=script" in argv
    assert argv[-3:] == ["mine.py", "--lr", "1"]


def test_lines_are_passed_on_and_the_last_ones_searched(capfd: pytest.CaptureFixture[str]) -> None:
    output = Output(JobConfig().all_causes())
    with output:
        os.write(output.descriptor, b"ncclSystemError: long ago\n" + b"step\n" * KEPT_LINES)
        os.write(output.descriptor, b"No space left on device\nbye")
    assert output.cause() == ("disk_full", "No space left on device")
    assert capfd.readouterr().out.endswith("step\nNo space left on device\nbye")


def test_starts_are_numbered_and_know_how_their_nodes_fared(folder: RunFolder) -> None:
    first = Start.claim(folder, Allocation.of(SLURM), step=40)
    assert (first.number, first.facts["step"], first.facts["hosts"]) == (1, 40, ["n1", "n2", "n3"])
    first.report(NodeReport("n2", code=1))
    first.report(NodeReport("n1", code=3, stopped="SIGTERM"))
    first.report(NodeReport("n2", code=0))
    assert [(report.host, report.code) for report in first.reports()] == [("n1", 3), ("n2", 0)]
    assert not first.is_left_behind()
    assert Start.claim(folder, Allocation.of({**SLURM, "SLURM_JOB_ID": "13"}), None).number == 2
    assert not first.is_left_behind()
    Start.claim(folder, Allocation.of(SLURM), None)
    assert first.is_left_behind()


def test_nobody_waits_for_a_head_that_says_nothing(folder: RunFolder) -> None:
    start = Start.claim(folder, Allocation.of(SLURM), None)
    assert start.await_head(lambda _: False, 60) is None
    start.announce("10.0.0.1:20012", 1)
    assert start.await_head(lambda _: True, 60) == "10.0.0.1:20012"


def test_code_that_was_submitted_comes_before_what_lies_where_the_job_runs(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "mine.py").write_text("print(1)")
    kept = take(folder, edited, scripts=["mine.py"])
    (edited / "mine.py").write_text("print(2)")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("EVERSTEP_START", "1")
    job = JobConfig(env={"PYTHONPATH": "/also"}, interface="ib0")
    with Signals() as signals:
        node = Node(folder, Allocation.of(SLURM), JobSpec(job, ("mine.py", "-v"), kept.place), signals)
    env = node.environment(share=3)
    code = node_folder() / kept.digest
    assert env["PYTHONPATH"] == f"{code}:/also:{os.getcwd()}"
    assert (code / "mine.py").read_text() == "print(1)"
    assert (env["PYTHONSAFEPATH"], env["EVERSTEP_STARTER"], env["OMP_NUM_THREADS"]) == ("1", "start-0001", "3")
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    assert node.program() == [f"{code}/mine.py", "-v"]


def test_a_folder_that_is_no_runs_is_one_line(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="is not a run folder; write everstep submit"):
        JobSpec.read(folder)


def test_clocks_that_agree_are_not_told_of(folder: RunFolder) -> None:
    start = Start.claim(folder, Allocation.of(SLURM), None)
    start.await_head(lambda _: False, 60)
    start.announce("10.0.0.1:20012", 1)
    start.await_head(lambda _: True, 60)
    assert start.ahead_of_head_s() == 0


@pytest.mark.parametrize("skew_s", [-10.0, 10.0, 900.0])
@pytest.mark.parametrize("stamps", [True, False])
def test_a_clock_that_differs_from_the_heads_is_measured(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, skew_s: float, stamps: bool
) -> None:
    """By the clock that stamps the folder's files; without one by when the head's word was missed, and then found."""
    start, true = Start.claim(folder, Allocation.of(SLURM), None), time.time
    if not stamps:
        monkeypatch.setattr(Start, "ahead_of_folder_s", lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: true() + skew_s)
        start.await_head(lambda _: False, 60)
    start.announce("10.0.0.1:20012", 1)
    monkeypatch.setattr(time, "time", lambda: true() + skew_s)
    assert start.await_head(lambda _: True, 60) == "10.0.0.1:20012"
    assert start.ahead_of_head_s() == pytest.approx(skew_s, abs=1)


def test_a_report_that_the_folder_does_not_take_costs_the_node_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setenv("EVERSTEP_START", "1")
    monkeypatch.setattr(Start, "report", full)
    with Signals() as signals:
        node = Node(folder, Allocation.of(SLURM), JobSpec(JobConfig(), ("-m", "everstep.trainer"), None), signals)
        node._report(NodeReport("n1"))
    assert "not written down (No space left on device)" in capsys.readouterr().err


def test_the_trainers_of_a_job_are_told_how_many_they_are_to_be(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_START", "1")
    with Signals() as signals:
        ours = Node(
            folder, Allocation.of(SLURM), JobSpec(JobConfig(nproc=4), ("-m", "everstep.trainer"), None), signals
        )
        other = Node(folder, Allocation.of(SLURM), JobSpec(JobConfig(nproc=4), ("mine.py",), None), signals)
        assert ours.environment(1)["EVERSTEP_WORLD"] == "12"
        assert "EVERSTEP_WORLD" not in other.environment(1)
