"""What the batch script is told before and after a start, from files in the run folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import StorageError
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.start_record import NodeReport, Start, decisions
from everstep.launch.restart import decide
from everstep.outcome import Ending, Fault, Outcome
from everstep.run_folder import CONFIG, JOB, STARTER, RunFolder

ALLOCATION = Allocation("slurm", "12", 0, "n1", ("n1", "n2"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(str(tmp_path / "run"))
    made.storage.write(CONFIG, b"run: run\n")
    made.storage.write(JOB, b"scheduler: slurm\nmax_restarts: 2\nexclude: [n9]\n")
    return made


def begin(folder: RunFolder, job: str = "12") -> int:
    return decide.begin(folder, Allocation("slurm", job, 0, "n1", ("n1", "n2")))


def attempt(folder: RunFolder, start: int, monkeypatch: pytest.MonkeyPatch, ending: Ending | None = None) -> None:
    monkeypatch.setenv(STARTER, f"start-{start:04d}")
    number = folder.claim({})
    if ending is not None:
        folder.end(number, ending)


def commit(folder: RunFolder, step: int, number: int) -> None:
    folder.storage.write(f"{folder.checkpoint(step, number)}/manifest.json", b"{}")


def end(folder: RunFolder, start: int, *options: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert decide.main(["end", folder.url, str(start), *options]) == 0
    return capsys.readouterr().out.split()


def last(folder: RunFolder) -> dict[str, Any]:
    return decisions(folder)[-1]


def test_begin_prints_the_number_of_the_start_and_takes_an_old_marker_away(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.storage.write("stop", b"USR1")
    assert begin(folder) == 0
    assert capsys.readouterr().out == "1\n"
    assert not folder.storage.exists("stop")


def test_a_start_that_the_scheduler_ended_is_decided_about_by_the_next(folder: RunFolder) -> None:
    begin(folder)
    assert begin(folder) == 0
    assert (last(folder)["cause"], last(folder)["restarts"], last(folder)["start"]) == ("lost", 1, 1)


def test_a_job_that_loses_its_nodes_again_and_again_without_progress_is_given_up(folder: RunFolder) -> None:
    assert [begin(folder) for _ in range(4)] == [0, 0, 0, 1]
    assert last(folder)["cause"] == "no_progress"
    assert "3 starts in a row made no new checkpoint" in last(folder)["reason"]


def test_each_new_checkpoint_begins_the_count_anew(folder: RunFolder) -> None:
    for step in range(1, 8):
        assert begin(folder) == 0
        commit(folder, step, step)


def test_another_job_begins_with_the_whole_budget(folder: RunFolder) -> None:
    assert [begin(folder) for _ in range(3)] == [0, 0, 0]
    assert begin(folder, job="13") == 0


def test_a_run_that_was_done_when_its_node_was_lost_does_not_start_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder)
    attempt(folder, 1, monkeypatch, Ending(Outcome.done, 300))
    assert begin(folder) == decide.ALREADY_OVER


def test_the_word_of_the_attempt_decides(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(folder)
    attempt(folder, 1, monkeypatch, Ending(Outcome.diverged, 7, "NaN"))
    assert end(folder, 1, "--code=1", capsys=capsys) == ["exit", "3"]
    begin(folder)
    attempt(folder, 2, monkeypatch, Ending(Outcome.preempted, 9, "SIGUSR1"))
    assert end(folder, 2, "--code=0", "--noticed", capsys=capsys) == ["requeue"]
    begin(folder)
    attempt(folder, 3, monkeypatch, Ending(Outcome.done, 300))
    assert end(folder, 3, "--code=0", capsys=capsys) == ["exit", "0"]


def test_nodes_to_avoid_are_named_together_with_those_of_before(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for start, bad in ((1, "n2"), (2, "n1")):
        begin(folder)
        Start(folder, start).report(NodeReport(bad, ("no interface ib0",)))
        told = end(folder, start, "--code=78", capsys=capsys)
    assert told == ["requeue", "n1,n2,n9"]


def test_a_node_that_stalls_twice_is_left_out_of_the_third_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for number, node in ((1, "n2"), (2, "n2")):
        begin(folder)
        for host in ("n1", "n2"):
            Start(folder, number).report(NodeReport(host, code=1))
        attempt(folder, number, monkeypatch, Ending(Outcome.stalled, number, "frozen: rank 3 …", node=node))
        told.append(end(folder, number, "--code=1", capsys=capsys))
    assert told == [["again"], ["requeue", "n2,n9"]]


def test_what_was_left_behind_waits_and_decides_nothing(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    begin(folder)
    begin(folder)
    before = decisions(folder)
    assert end(folder, 1, "--code=1", capsys=capsys) == ["wait"]
    assert decisions(folder) == before


def test_an_attempt_of_another_command_ends_the_job(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(folder)
    attempt(folder, 1, monkeypatch)
    monkeypatch.setenv(STARTER, "somebody")
    folder.claim({})
    assert end(folder, 1, "--code=1", capsys=capsys) == ["exit", "4"]


def test_every_decision_stands_in_the_run_folder_with_its_reason(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(folder)
    assert end(folder, 1, "--code=1", capsys=capsys) == ["again"]
    kept = json.loads(folder.storage.read("restarts/0001.json"))
    assert {"action", "reason", "cause", "outcome", "restarts", "go_on", "start", "job", "time"} <= kept.keys()
    assert (kept["go_on"], kept["job"], kept["start"]) == (True, "12", 1)


def test_a_folder_that_is_no_runs_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decide.main(["begin", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def full(*_: object) -> None:
    error = StorageError("cannot write x: No space left on device")
    error.passing = True
    raise error


def test_a_job_waits_held_for_a_run_folder_that_cannot_be_written(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(decide.WAIT, "0")
    assert begin(folder) == 0
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "record_restart", full)
        assert decide.main(["end", folder.url, "1", "--code=1"]) == decide.HOLD
        printed = capsys.readouterr()
        assert printed.out.split()[-1] == "hold"
        assert "No space left on device" in printed.err
        assert "scontrol release" in printed.err
    assert folder.storage.names("restarts") == []
    assert begin(folder) == 0  # released: what was not decided is decided now, and it goes on
    assert last(folder)["cause"] == "lost"


def test_a_run_that_is_done_ends_well_though_that_cannot_be_written(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(decide.WAIT, "0")
    begin(folder)
    attempt(folder, 1, monkeypatch, Ending(Outcome.done, 300))
    monkeypatch.setattr(RunFolder, "record_restart", full)
    assert end(folder, 1, "--code=0", capsys=capsys) == ["exit", "0"]


def test_a_start_waits_for_a_folder_that_is_full_for_a_moment(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "AGAIN_S", 0.01)
    create, tries = folder.storage.create, iter([full, full])
    monkeypatch.setattr(folder.storage, "create", lambda *words: next(tries, create)(*words))
    monkeypatch.setattr(decide, "RunFolder", lambda url: folder)
    monkeypatch.setattr(decide.Allocation, "of", lambda _: ALLOCATION)
    assert decide.main(["begin", folder.url]) == 0
    assert capsys.readouterr().err.count("waiting for the run folder") == 1


def test_what_a_node_could_not_write_is_known_by_its_report(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder)
    attempt(folder, 1, monkeypatch)
    told = Ending(Outcome.crashed, 0, "TypeError: x", fault=Fault.user, error="TypeError")
    Start(folder, 1).report(NodeReport("n1", code=1, ending=json.loads(told.to_json())))
    assert end(folder, 1, "--code=1", capsys=capsys) == ["exit", "1"]
    assert last(folder)["cause"] == "user_error"
