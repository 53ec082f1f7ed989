"""Notifications: what is told of a run, in which words, and that nobody waits for them."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import ConfigError
from everstep.launch.config.job import JobConfig
from everstep.launch.config.notify import NotifyConfig
from everstep.launch.runs import notifier
from everstep.launch.runs.notifier import Notice, Notifier, Watch, tell
from everstep.run_folder import EVENTS, PROGRESS, RunFolder
from everstep.security.config_trust import refuse_code

NOTICE = Notice("best", "demo", "runs/demo", 7, "held-out at step 7: loss 1")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(str(tmp_path / "demo"))
    found.claim({})
    return found


def events(folder: RunFolder, *records: dict[str, Any]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    folder.storage.write(folder.attempt(1, EVENTS), text.encode())


def test_a_new_best_a_failure_a_stall_and_the_end_are_each_told_once(folder: RunFolder) -> None:
    watch = Watch(folder, "demo", 1e9)
    best = {"event": "evaluated", "step": 10, "best": True, "line": "loss 1"}
    events(folder, best, {"event": "evaluated", "step": 20, "best": False, "line": "loss 2"})
    assert [(n.kind, n.step, n.message) for n in watch.news()] == [("best", 10, "loss 1")]
    for outcome in ("crashed", None, "stalled", "done"):
        folder.record_restart({"outcome": outcome, "reason": f"it was {outcome}"})
    assert [n.kind for n in watch.news()] == ["failure", "failure", "stall", "end"]
    assert list(watch.news()) == []


def test_what_was_there_before_is_no_news(folder: RunFolder) -> None:
    events(folder, {"event": "evaluated", "step": 10, "best": True})
    folder.record_restart({"outcome": "crashed", "reason": "x"})
    assert list(Watch(folder, "demo", 1e9).news()) == []


def test_a_run_that_gets_no_further_is_told_once_until_it_does(folder: RunFolder) -> None:
    watch = Watch(folder, "demo", 0.0)
    told = []
    for step in (5, 5, 5, 6, 6, 6):
        folder.storage.write(PROGRESS, json.dumps({"step": step}).encode())
        told.append([n.kind for n in watch.news()])
    assert told == [[], ["no_progress"], [], [], ["no_progress"], []]


def test_a_command_finds_the_event_in_its_environment(folder: RunFolder, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f'echo "$EVERSTEP_EVENT $EVERSTEP_RUN $EVERSTEP_STEP $EVERSTEP_MESSAGE" >> {told}'
    with Notifier(folder, "demo", NotifyConfig(command=command, on=["end"])):
        events(folder, {"event": "evaluated", "step": 10, "best": True})
        folder.record_restart({"outcome": "done", "reason": "done (step 50)"})
    assert told.read_text() == "end demo 0 done (step 50)\n"


def test_a_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(notifier, "TELL_S", 0.1)
    tell(NotifyConfig(command="sleep 1000 & wait"), NOTICE)
    assert "job.notify.command did not end within 0 s and was killed (best)" in capsys.readouterr().err


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    got: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", got
        listening.shutdown()


def test_a_webhook_gets_an_object_and_its_address_is_shown_to_nobody(
    server: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, got = server
    config = NotifyConfig(webhook="MY_HOOK")
    monkeypatch.setenv("MY_HOOK", f"{url}/hook")
    tell(config, NOTICE)
    assert (got[0]["text"], got[0]["event"], got[0]["step"]) == ("demo: held-out at step 7: loss 1", "best", 7)
    assert capsys.readouterr().err == ""
    for wrong, said in ((f"{url}/broken", "HTTPError"), ("", "holds no http(s) URL"), ("file:///etc", "no http(s)")):
        monkeypatch.setenv("MY_HOOK", wrong)
        tell(config, NOTICE)
        shown = capsys.readouterr().err
        assert said in shown
        assert not wrong or wrong not in shown


def test_an_address_in_the_config_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match=r"job.notify.webhook='…'.*name of an environment variable") as refused:
        NotifyConfig(webhook="https://hooks.example.com/T0/SECRET")
    assert "SECRET" not in str(refused.value)


def test_the_variable_of_a_webhook_has_to_reach_the_nodes() -> None:
    notify = NotifyConfig(webhook="MY_HOOK")
    with pytest.raises(ValueError, match=r"job.notify.webhook=.*name it in job.secrets too"):
        JobConfig(scheduler="slurm", notify=notify)
    JobConfig(scheduler="slurm", notify=notify, secrets=["MY_HOOK"])


def test_a_command_of_another_users_config_is_refused() -> None:
    used = {"job": {"notify": {"command": "curl evil"}}}
    with pytest.raises(ConfigError, match=r"it would run job.notify.command=curl evil"):
        refuse_code("conf: others can write", used, {})
    refuse_code("conf: others can write", used, used)
