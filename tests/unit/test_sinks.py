"""Trackers as plug-ins: on threads of their own, each step once after kills, and none of them holds training up."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.config import LogConfig
from everstep.errors import ConfigError
from everstep.run_folder import RunFolder
from everstep.trainer.reporting.sinks import JsonLines
from everstep.trainer.reporting.trackers import sink_thread
from everstep.trainer.reporting.trackers.opening import open_sinks
from everstep.trainer.reporting.trackers.sink_thread import SinkThread

CONFIG = {"steps": 40, "optimizer": {"lr": 0.1}}


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "time": 1.8e9 + step, "unit": "samples"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    go_on = threading.Event()
    yield go_on
    go_on.set()


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def log(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


class Hangs(Kept):
    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self.go_on = go_on

    def log(self, record: Any) -> None:
        self.go_on.wait()


def test_a_sink_gets_every_record_in_order_and_is_closed() -> None:
    kept = Kept()
    sink = SinkThread("kept", lambda: kept)
    for step in range(500):
        sink.log(train(step, 1.0))
    sink.close()
    assert [record["step"] for record in kept.records] == list(range(500))
    assert kept.closed


@pytest.mark.parametrize("where", ["open", "log"])
def test_a_sink_that_hangs_holds_up_neither_a_step_nor_the_end(
    where: str, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sink_thread, "CLOSE_S", 0.05)
    monkeypatch.setattr(sink_thread, "MOST_WAITING", 10)

    def opened() -> Kept:
        if where == "open":
            hanging.wait()
        return Hangs(hanging)

    sink = SinkThread("far away", opened)
    for step in range(100):  # would wait forever if the sink were on this thread
        sink.log(train(step, 1.0))
    sink.close()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: far away is 10 records behind; training goes on, and what follows is left out there"
    assert "far away has not ended within 0 s" in said[1]
    assert "everstep sync RUN" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize("when", ["in training", "at the end"])
def test_a_sink_that_could_not_be_opened_at_first_gets_every_record(
    when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tracker whose server starts slowly lacks nothing."""
    monkeypatch.setattr(sink_thread, "AGAIN_S", 0.01 if when == "in training" else 3600.0)
    kept, tries = Kept(), iter([TimeoutError("no answer"), None])
    opened = threading.Event()

    def opener() -> Kept:
        if (error := next(tries)) is not None:
            raise error
        opened.set()
        return kept

    sink = SinkThread("far away", opener)
    sink.log(train(1, 1.0))
    if when == "in training":
        assert opened.wait(30)
    sink.log(train(2, 0.5))
    sink.close()
    assert [record["step"] for record in kept.records] == [1, 2]
    assert kept.closed
    said = "far away cannot be opened, training goes on without it: TimeoutError: no answer"
    assert capsys.readouterr().err == f"warning: {said}\n"


def test_what_a_kill_left_unwritten_reaches_a_sink_that_takes_each_step_once(folder: RunFolder) -> None:
    lines = JsonLines(folder.storage, folder.attempt(folder.claim({}), "metrics.jsonl"))
    for record in (train(1, 1.0), train(2, 0.5), train(3, 0.4)):
        lines.log(record)
    lines.close()
    once = Kept()
    once.once = True  # type: ignore[attr-defined]
    from everstep.trainer.reporting.trackers.opening import earlier

    sink = SinkThread("kept", lambda: once, lambda: earlier(folder, 2))
    sink.log(train(3, 0.25))
    sink.close()
    assert [(record["step"], record["loss"]) for record in once.records] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def attempts(folder: RunFolder, log: LogConfig) -> None:
    """Three attempts: the second goes on from step 20, and its tracker lacks what the first did not hand over."""
    starts = [(0, [10, 20, 30]), (20, [30, 40]), (40, [50])]
    for start, steps in starts:
        number = folder.claim({})
        sinks = open_sinks(log, "demo", folder, number, CONFIG, start)
        for step in steps:
            for sink in sinks[: 1 if (start, step) == (0, 20) else None]:
                sink.log(train(step, 1.0 / step))
        for sink in sinks:
            sink.close()


def test_mlflow_has_each_step_once_after_restarts(folder: RunFolder) -> None:
    pytest.importorskip("mlflow")
    attempts(folder, LogConfig(sinks=[{"_target_": "everstep.sinks.MLflow", "experiment": "tests"}]))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=Path(folder.url, "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in history) == [(s, 1.0 / s) for s in (10, 20, 30, 40, 50)]
    assert run.data.params["optimizer.lr"] == "0.1"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")


def test_trackio_has_each_step_once_after_restarts(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    for name in [name for name in __import__("sys").modules if name.startswith("trackio")]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    attempts(folder, LogConfig(sinks=[{"_target_": "everstep.sinks.Trackio", "project": "tests"}]))
    (file,) = (tmp_path / "trackio").glob("tests*.db")
    with sqlite3.connect(file) as database:
        assert [row[0] for row in database.execute("SELECT step FROM metrics ORDER BY step")] == [10, 20, 30, 40, 50]


def test_a_sink_of_the_users_own_package_gets_what_its_constructor_names(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_sink.py").write_text(
        "class Own:\n"
        "    def __init__(self, run, folder, config, place):\n"
        "        self.file = open(place, 'a')\n"
        "        self.file.write(f'{run} {config[\"steps\"]}\\n')\n"
        "    def log(self, record):\n"
        "        self.file.write(f'{record[\"step\"]}\\n')\n"
        "    def close(self):\n"
        "        self.file.close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"_target_": "own_sink.Own", "place": str(tmp_path / "place")}
    for sink in open_sinks(LogConfig(sinks=[node]), "demo", folder, 1, CONFIG, plugins=["own_sink"]):
        sink.log(train(7, 1.0))
        sink.close()
    assert (tmp_path / "place").read_text() == "demo 40\n7\n"


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "own_sink.Own"}, r"log.sinks\[0\]._target_='own_sink.Own' is in none of the packages"),
        ({"_target_": "everstep.sinks.MLflow", "server": 1}, r"log.sinks\[0\].server: everstep.sinks.MLflow takes no"),
        ({"_target_": "everstep.sinks.Mlfow"}, "did you mean 'MLflow'"),
        ({"experiment": "x"}, r"log.sinks\[0\] has no _target_"),
    ],
)
def test_a_node_that_is_wrong_is_one_line(folder: RunFolder, node: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_sinks(LogConfig(sinks=[node]), "demo", folder, 1, CONFIG)
