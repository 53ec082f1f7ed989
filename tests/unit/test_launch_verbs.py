"""ls, status, logs, cancel: from the run folder alone, in any shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everstep.launch.__main__ import main
from everstep.launch.cli import logs
from everstep.launch.runs import status_text
from everstep.launch.runs.goodput import Goodput
from everstep.launch.schedulers import registry
from everstep.launch.schedulers.job import JobHandle, new_token
from support.file_scheduler import VARIABLE, FileScheduler
from support.processes import alive, until
from support.run_records import Records


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileScheduler:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    return FileScheduler()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def done(root: Path, name: str, ago_s: float = 1000.0) -> Records:
    records = Records(str(root / name), ago_s, steps=50)
    records.attempt(1, 0)
    records.events(1, (10, "first_step", {"step": 1}))
    records.progress(
        100,
        50,
        50,
        steps_per_s=0.5,
        eta_s=0.0,
        loss=0.25,
        metric="accuracy",
        metrics={"aardvarks": 9.0, "accuracy": 0.75},
    )
    records.log(1, "one\ntwo\nthree\n")
    records.end(1, 110, "done", 50)
    return records


WAITS = "import signal, time\nsignal.signal(15, lambda *_: exit(75))\nprint(1, flush=True)\nwhile True: time.sleep(0.1)"
"""A process that ends with 75 when it is told to stop."""


def queued(root: Path, name: str, jobs: FileScheduler, number: str, **facts: Any) -> Records:
    records = Records(str(root / name))
    token = new_token(records.folder.storage.url)
    records.submit(1, 0, jobs.set(number, token=token, **facts), token=token)
    return records


def objects(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_ls_shows_every_run_in_a_line_the_newest_last(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    done(root, "old", 9000.0)
    queued(root, "waits", jobs, "7", reason="Resources")
    (root / "notes").mkdir()
    (root / ".hidden").mkdir()
    assert main(["ls"]) == 0
    header, old, waits = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "rate", "left", "last", "metric", "attempt", "where", "age"]
    assert old.split()[:6] == ["old", "done", "50/50", "accuracy", "0.75", "1"]
    assert waits.split()[:4] == ["waits", "queued", "slurm", "7"]


def test_many_runs_cost_one_query(root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        queued(root, f"r{number}", jobs, str(number))
    assert main(["ls", "--json"]) == 0
    assert {each["state"] for each in objects(capsys)} == {"queued"}
    assert jobs.known()["queries"] == 1


def test_a_controller_that_is_away_hides_no_run(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    done(root, "local")
    queued(root, "far", jobs, "1")
    jobs.keep({**jobs.known(), "away": True})
    assert main(["ls", "--json"]) == 0
    assert {each["run"]: (each["state"], each["why"]) for each in objects(capsys)} == {
        "local": ("done", ""), "far": ("silent", "the controller does not answer"),
    }  # fmt: skip


def test_a_run_whose_folder_cannot_be_read_is_left_out_with_a_word(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done(root, "good")
    bad = Records(str(root / "bad"))
    (root / "bad" / "attempts").symlink_to("attempts")
    assert main(["ls", "--json"]) == 0
    shown = capsys.readouterr()
    assert [each["run"] for each in json.loads(shown.out)] == ["good"]
    assert "bad: attempts is a link" in shown.err
    assert bad.folder.url in shown.err


def test_ls_of_an_empty_folder_says_where_it_looked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 2
    assert capsys.readouterr().err == "everstep: runs holds no run; 'everstep ls ROOT' looks elsewhere\n"


def test_ls_of_an_object_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://bucket/{tmp_path.name}"
    Records(f"{url}/far").attempt(1, 999)
    assert main(["ls", url, "--json"]) == 0
    assert [(each["run"], each["state"]) for each in objects(capsys)] == [("far", "starting")]


@pytest.mark.parametrize("word", ["demo", "runs/demo", "./runs/demo/", "{root}/demo", "file://{root}/demo"])
def test_a_run_is_a_name_a_path_or_a_url(root: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    done(root, "demo")
    assert main(["status", word.format(root=root), "--json"]) == 0
    assert objects(capsys)["run"] == "demo"


@pytest.mark.parametrize(
    ("word", "said"),
    [("dmo", "everstep: dmo: there is no such run in runs; did you mean 'demo'?\n"),
     ("runs/demos", "everstep: runs/demos: there is no such run in runs; did you mean 'demo'?\n"),
     ("{root}/demos", "everstep: {root}/demos: there is no such run in {root}; did you mean 'demo'?\n"),
     ("zzz", "everstep: zzz: there is no such run in runs; 'everstep ls runs' shows which there are\n")],
)  # fmt: skip
def test_a_mistyped_name_gets_the_nearest(root: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    done(root, "demo")
    for verb in ("status", "logs", "cancel", "resume"):
        assert main([verb, word.format(root=root)]) == 2
        assert capsys.readouterr().err == said.format(root=root)


def test_status_says_where_it_stands_and_where_the_time_went(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = done(root, "demo")
    records.folder.storage.write("checkpoints/step-00000050-attempt-0001/manifest.json", b"{}")
    assert main(["status", "demo"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["state"] == "done"
    assert shown["step"] == "50 of 50"
    assert shown["checkpoint"] == "step 50"
    assert shown["attempt"].startswith("1, 2 processes")
    assert "goodput" not in shown  # two minutes say nothing about it yet


def test_status_shows_the_goodput_from_five_minutes_on() -> None:
    spent = {"productive": 200.0, "start": 99.0}
    assert status_text._goodput(Goodput(spent)) == []
    spent["start"] = 100.0
    assert status_text._goodput(Goodput(spent)) == [("goodput", "66.7% of 5 min; the rest: start 1 min 40 s (33.3%)")]


def test_status_has_the_energy_of_a_run_whose_gpus_told_their_power(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = done(root, "a")
    assert main(["status", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["energy_kwh"] is None
    records.write("attempts/0001/nodes/0000.jsonl", {"energy_j": 1.8e6})
    assert main(["status", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["energy_kwh"] == 0.5
    assert main(["status", "a"]) == 0
    assert "energy       0.5 kWh of GPUs\n" in capsys.readouterr().out


def test_where_the_time_went_fits_a_terminal_of_80_columns() -> None:
    spent = {"productive": 50.0, "evaluation": 9.0, "start": 5.0, "down": 1.0, "queue": 300.0, "checkpoint": 7.0}
    shown = [f"{name:<12} {value}" if name else value for name, value in status_text._goodput(Goodput(spent))]
    assert max(map(len, shown)) <= 80
    assert " ".join(row[13:] for row in shown) == (
        "13.4% of 6 min 12 s; the rest: queue 5 min (80.6%), evaluation 9 s (2.4%), checkpoint 7 s (1.9%), "
        "start 5 s (1.3%), down 1 s (0.3%)"
    )


def test_status_tells_why_a_run_was_started_again_and_why_it_failed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(str(root / "demo"))
    records.attempt(1, 0)
    records.end(1, 50, "crashed", 5, "lost a peer")
    records.decide(1, 51, True, "crashed at step 5: lost a peer; starting again")
    records.attempt(2, 60)
    records.log(2, "\n".join(f"line {n}" for n in range(20)) + "\nValueError: no\n", rank=1)
    records.end(2, 90, "crashed", 7, "ValueError: no", rank=1)
    records.decide(2, 91, False, "crashed at step 7: ValueError: no; no other start")
    assert main(["status", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "state        failed: crashed at step 7: ValueError: no; no other start" in shown
    assert "lost a peer; starting again" in shown
    assert shown.endswith("  line 19\n  ValueError: no\n")
    assert "line 12" not in shown


def test_status_of_a_queued_run_says_why_it_waits(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(root, "demo", jobs, "7", reason="Priority")
    assert main(["status", "demo"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["state"], shown["job"]) == ("queued: Priority", "slurm://file/7")
    assert shown["goodput"].startswith("0.0% of 16 min 40 s; the rest: queue 16 min 40 s (100.0%)")


def test_status_of_a_running_job_names_its_nodes(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    records = queued(root, "demo", jobs, "7", state="running", nodes=["n1", "n2"])
    records.attempt(1, 600)
    records.progress(990, 500, 1000, steps_per_s=2.0, eta_s=250.0, loss=0.5)
    assert main(["status", "demo", "--json"]) == 0
    shown = objects(capsys)
    assert (shown["state"], shown["nodes"], shown["eta_s"]) == ("training", ["n1", "n2"], 250.0)
    assert sum(shown["goodput"]["parts_s"].values()) == pytest.approx(shown["goodput"]["wall_s"], abs=0.1)


def test_following_a_status_ends_with_the_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(root, "demo")
    assert main(["status", "demo", "-f"]) == 0
    assert capsys.readouterr().out.startswith("done  attempt 1")
    assert main(["status", "demo", "-f", "--json"]) == 0
    assert objects(capsys)["state"] == "done"


def test_logs_are_of_the_newest_attempt_and_rank_0_unless_one_says_otherwise(
    root: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    records = done(root, "demo")
    records.attempt(2, 200)
    records.log(2, "new\n")
    records.log(2, "other rank\n", rank=3)
    for words, expected in (
        ([], b"new\n"),
        (["--rank", "3"], b"other rank\n"),
        (["--attempt", "1"], b"one\ntwo\nthree\n"),
        (["--attempt", "1", "--tail", "2"], b"two\nthree\n"),
        (["--attempt", "1", "--tail", "0"], b""),
    ):
        assert main(["logs", "demo", *words]) == 0
        assert capfdbinary.readouterr().out == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--rank", "9"], "--rank 9: attempt 1 has the logs of 0"), (["--attempt", "4"], "--attempt 4: the run has 1")],
)
def test_a_log_that_is_not_there_names_those_that_are(
    root: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done(root, "demo")
    assert main(["logs", "demo", *words]) == 2
    assert capsys.readouterr().err == f"everstep: {said}\n"


def test_a_log_with_nothing_in_it_is_said_to_be_empty(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done(root, "demo").log(1, "", rank=1)
    assert main(["logs", "demo", "--rank", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "attempts/0001/rank-0001.log is empty; --job shows what all processes have printed" in shown.err


@pytest.mark.process
def test_following_goes_on_across_a_restart_until_the_run_is_over(root: Path, tmp_path: Path) -> None:
    records = Records(str(root / "demo"), ago_s=0)
    records.attempt(1, 0, host=socket.gethostname(), pid=os.getpid())
    records.log(1, "begin\n")
    fast = "import everstep.launch.cli.logs as l; l.POLL_S = 0.01; l.STATE_EVERY_S = 0.01; "
    fast += "from everstep.launch.__main__ import main; "
    followed = (tmp_path / "followed").open("w+b")
    following = subprocess.Popen(
        [sys.executable, "-c", f"{fast}raise SystemExit(main(['logs', 'demo', '-f']))"],
        stdout=followed, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    text = tmp_path / "followed"
    until(lambda: text.read_text() == "begin\n")
    log = root / "demo" / "attempts" / "0001" / "rank-0000.log"
    log.write_text("begin\nmiddle\n")
    until(lambda: text.read_text() == "begin\nmiddle\n")
    records.decide(1, 1, True, "killed without a word; starting again")
    records.attempt(2, 1, host=socket.gethostname(), pid=os.getpid())
    records.log(2, "again\n")
    expected = "begin\nmiddle\n--- attempt 2: killed without a word; starting again ---\nagain\n"
    until(lambda: text.read_text() == expected)
    records.log(2, "again\nlast words\n")
    records.end(2, 2, "done", 9)
    assert following.wait(timeout=20) == 0
    assert text.read_text() == f"{expected}last words\n"
    followed.close()


@pytest.mark.process
def test_ctrl_c_ends_following_quietly(root: Path, tmp_path: Path) -> None:
    records = Records(str(root / "demo"), ago_s=0)
    records.attempt(1, 0, host=socket.gethostname(), pid=os.getpid())
    records.log(1, "begin\n")
    following = subprocess.Popen(
        [sys.executable, "-m", "everstep.launch", "logs", "demo", "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert following.stdout is not None
    assert following.stdout.readline() == b"begin\n"
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=20)
    assert (following.returncode, said) == (130, b"")


def test_what_a_job_printed_is_a_log_of_its_own(root: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    records = done(root, "demo")
    assert main(["logs", "demo", "--job"]) == 2
    assert b"has no output of a job yet" in capfdbinary.readouterr().err
    for number in (9, 10):
        records.folder.storage.write(f"slurm-{number}.out", f"job {number}\n".encode())
    assert main(["logs", "demo", "--job"]) == 0
    assert main(["logs", "demo", "--job", "-f"]) == 0
    assert capfdbinary.readouterr().out == b"job 10\njob 10\n"


def test_a_log_in_an_object_store_is_read_from_where_it_was_left(tmp_path: Path) -> None:
    records = Records(f"memory://logs/{tmp_path.name}")
    records.log(1, "one\n")
    tail = logs.Tail(records.folder, "attempts/0001/rank-0000.log")
    assert b"".join(tail.added()) == b"one\n"
    records.log(1, "one\ntwo\n")
    assert (b"".join(tail.added()), b"".join(tail.added())) == (b"two\n", b"")


def test_cancel_tells_the_scheduler_and_the_run_stays_cancelled_when_that_has_forgotten(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(root, "a", jobs, "1", state="running")
    queued(root, "b", jobs, "2")
    done(root, "c")
    assert main(["cancel", "a", "b", "c"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: slurm://file/1 is cancelled; the last checkpoint stands",
        "b: slurm://file/2 is cancelled; the last checkpoint stands",
        "c: is over already (done)",
    ]
    assert {job["state"] for job in jobs.known()["jobs"].values()} == {"cancelled"}
    jobs.keep({"jobs": {}, "queries": 0})
    assert main(["ls", "--json"]) == 0
    assert {each["run"]: each["state"] for each in objects(capsys)} == {"a": "cancelled", "b": "cancelled", "c": "done"}


def test_cancel_finds_the_job_of_a_launcher_that_died(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(str(root / "demo"))
    token = new_token(records.folder.storage.url)
    records.submit(1, 0, None, token=token)
    jobs.set("5", token=token)
    assert main(["cancel", "demo"]) == 0
    assert jobs.known()["jobs"]["5"]["state"] == "cancelled"
    assert capsys.readouterr().out.startswith("demo: slurm://file/5 is cancelled")


def test_one_unknown_name_cancels_nothing(root: Path, jobs: FileScheduler) -> None:
    queued(root, "a", jobs, "1")
    assert main(["cancel", "a", "nosuch"]) == 2
    assert jobs.known()["jobs"]["1"]["state"] == "pending"


@pytest.mark.process
def test_cancel_tells_a_run_on_this_machine_to_save_and_end(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", WAITS, "everstep.trainer", "--frozen", str(root / "demo")], stdout=subprocess.PIPE
    )
    assert trainer.stdout is not None
    trainer.stdout.readline()
    records = Records(str(root / "demo"), ago_s=0)
    records.attempt(1, 0, host=socket.gethostname(), pid=trainer.pid)
    assert main(["cancel", "demo"]) == 0
    assert f"attempt 1 is told to stop (process {trainer.pid})" in capsys.readouterr().out
    assert records.folder.storage.exists("stop")
    assert trainer.wait(timeout=20) == 75
    until(lambda: not alive(trainer.pid))


def test_cancel_signals_no_process_that_does_not_train_this_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["sleep", "60"], ["everstep.trainer", "--frozen", str(root / "of another")]):
        other = subprocess.Popen([sys.executable, "-c", WAITS, *words], stdout=subprocess.PIPE)
        assert other.stdout is not None
        other.stdout.readline()
        records = Records(str(root / "demo"), ago_s=0)
        records.attempt(1, 0, host=socket.gethostname(), pid=other.pid)
        assert main(["cancel", "demo"]) == 0
        assert "is told to stop by a marker in the run folder" in capsys.readouterr().out
        assert other.poll() is None
        other.kill()
        other.wait()


@pytest.mark.parametrize("id", ["--user=root", "-9", "1 2", "1;id", "--name=x/1"])
def test_a_handle_that_is_an_option_is_no_job(root: Path, id: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(str(root / "demo"))
    records.submit(1, 0, JobHandle("slurm", "x", id))
    assert main(["cancel", "demo"]) == 2
    assert "is not a job: it should look like slurm://cluster/1234" in capsys.readouterr().out


def test_a_job_of_another_run_is_not_cancelled(
    root: Path, jobs: FileScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    own = queued(root, "own", jobs, "7")
    foreign = Records(str(root / "foreign"))
    intent = json.loads(own.folder.storage.read("submissions/0001.json"))
    foreign.submit(1, 0, JobHandle("slurm", "file", "7"), token=intent["token"])
    assert main(["cancel", "foreign"]) == 2
    assert "slurm://file/7 was not submitted for" in capsys.readouterr().out
    assert jobs.known()["jobs"]["7"]["state"] == "pending"
    assert main(["cancel", "own"]) == 0
    assert jobs.known()["jobs"]["7"]["state"] == "cancelled"


def test_cancel_leaves_a_marker_for_a_run_on_another_machine(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(str(root / "demo"), ago_s=60)
    records.attempt(1, 0)
    assert main(["cancel", "demo"]) == 0
    assert "attempt 1 on elsewhere is told to stop by a marker" in capsys.readouterr().out
    assert records.folder.storage.read("stop") == b"cancelled"


def test_cancel_between_two_attempts_stops_the_next(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(str(root / "demo"), ago_s=60)
    records.attempt(1, 0)
    records.end(1, 50, "crashed", 5)
    records.decide(1, 59, True, "starting again")
    assert main(["cancel", "demo"]) == 0
    assert "is between two attempts" in capsys.readouterr().out
    assert records.folder.storage.exists("stop")
    assert main(["status", "demo", "--json"]) == 0
    assert objects(capsys)["state"] == "cancelled"


@pytest.mark.process
@pytest.mark.parametrize("verb", ["ls", "status", "logs", "cancel", "resume"])
def test_verbs_of_a_run_import_no_torch(root: Path, verb: str) -> None:
    records = done(root, "demo")
    words = [verb, *([] if verb == "ls" else ["demo"])]
    code = f"import sys; from everstep.launch.__main__ import main; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    assert records.folder.attempts() == [1]
