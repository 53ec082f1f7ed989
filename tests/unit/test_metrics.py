"""What a run writes down: its own lines, always; W&B and TensorBoard on request; and no sink stops training."""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.config import LogConfig, WandbConfig
from everstep.errors import ConfigError, StorageError
from everstep.rank_env import RankInfo
from everstep.run_folder import RunFolder
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.reporting.console import Quiet
from everstep.trainer.reporting.reporter import Outputs, Reporter, RunFacts, folded
from everstep.trainer.reporting.sinks import Guarded, JsonLines, read_lines, read_metrics
from everstep.trainer.reporting.startup_timing import StartupTimer
from everstep.trainer.reporting.trackers.opening import open_sinks
from everstep.trainer.reporting.trackers.tensorboard_sink import TensorBoardSink
from everstep.trainer.reporting.trackers.wandb_sink import WandbSink, last_steps, rows
from everstep.trainer.step_info import StepInfo
from support.processes import until


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss}


def write(folder: RunFolder, attempt: int, records: list[dict[str, Any]]) -> None:
    lines = JsonLines(folder.storage, folder.attempt(attempt, "metrics.jsonl"))
    for record in records:
        lines.log(record)
    lines.close()


def test_a_step_that_was_replayed_supersedes_its_earlier_record(folder: RunFolder) -> None:
    write(folder, 1, [train(1, 1.0), train(2, 0.9), {"kind": "evaluate", "step": 2, "loss": 5.0}, train(3, 0.8)])
    write(folder, 2, [train(2, 0.7), train(4, 0.6)])
    assert {step: r["loss"] for step, r in read_metrics(folder).items()} == {1: 1.0, 2: 0.7, 3: 0.8, 4: 0.6}
    assert list(read_metrics(folder)) == [1, 2, 3, 4]
    assert {step: r["loss"] for step, r in read_metrics(folder, "evaluate").items()} == {2: 5.0}


def test_nan_and_infinity_come_back(folder: RunFolder) -> None:
    write(folder, 1, [train(1, float("nan")), train(2, float("inf"))])
    losses = [r["loss"] for r in read_metrics(folder).values()]
    assert losses[0] != losses[0]
    assert losses[1] == float("inf")


def test_local_lines_are_there_at_once_and_a_second_writer_appends(local: RunFolder) -> None:
    lines = JsonLines(local.storage, local.attempt(1, "metrics.jsonl"))
    lines.log(train(1, 0.5))
    assert list(read_metrics(local)) == [1]
    write(local, 1, [train(2, 0.4)])
    assert list(read_metrics(local)) == [1, 2]
    lines.close()


def test_a_line_that_a_kill_cut_short_is_left_out(local: RunFolder) -> None:
    write(local, 1, [train(1, 0.5), train(2, 0.4)])
    file = local.storage.path(local.attempt(1, "metrics.jsonl"))
    assert file is not None
    whole = file.read_bytes()
    for cut in range(len(whole) - 2, whole.index(b"\n") + 1, -7):
        file.write_bytes(whole[:cut])
        assert list(read_metrics(local)) == [1]


def test_a_store_that_cannot_append_gets_parts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(f"memory://{uuid.uuid4().hex}/run")
    monkeypatch.setattr("everstep.trainer.reporting.sinks.PART_EVERY_S", -1.0)
    write(folder, 1, [train(step, 1.0 / step) for step in range(1, 13)])
    monkeypatch.setattr("everstep.trainer.reporting.sinks.PART_EVERY_S", 1000.0)
    write(folder, 2, [train(12, 7.0), train(13, 1.0)])
    assert folder.storage.names(folder.attempt(1)) == [f"metrics-{n:05d}.jsonl" for n in range(12)]
    assert folder.storage.names(folder.attempt(2)) == ["metrics-00000.jsonl"]
    assert [r["step"] for r in read_lines(folder, "metrics.jsonl")] == [*range(1, 13), 12, 13]
    assert read_metrics(folder)[12]["loss"] == 7.0


def test_a_store_that_is_down_for_a_while_loses_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(f"memory://{uuid.uuid4().hex}/run")
    monkeypatch.setattr("everstep.trainer.reporting.sinks.PART_EVERY_S", -1.0)
    lines = JsonLines(folder.storage, folder.attempt(1, "metrics.jsonl"))

    def down(*_: object) -> None:
        raise StorageError("the store is down")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "everstep"):
        patched.setattr(folder.storage, "write", down)
        for step in (1, 2, 3):
            lines.log(train(step, 1.0))
        until(lambda: "is behind, training goes on: the store is down" in caplog.text)
    lines.log(train(4, 1.0))
    lines.close()
    folder.claim({})
    assert list(read_metrics(folder)) == [1, 2, 3, 4]


class Fragile:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, record: object) -> None:
        self.calls += 1
        raise OSError("no space left")

    def close(self) -> None:
        raise RuntimeError("never")


def test_a_sink_that_fails_is_switched_off_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    fragile = Fragile()
    sink = Guarded("W&B", fragile)
    with caplog.at_level(logging.WARNING, "everstep"):
        for step in range(3):
            sink.log(train(step, 1.0))
        sink.close()
    assert fragile.calls == 1
    assert caplog.messages == ["W&B failed and is switched off, training goes on: OSError: no space left"]


def test_a_sink_that_fails_as_it_closes_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "everstep"):
        Guarded("W&B", Fragile()).close()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("log", "name", "package", "extra"),
    [
        ({"wandb": WandbConfig(enabled=True)}, "W&B", "wandb", "wandb"),
        ({"tensorboard": True}, "TensorBoard", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_package_that_is_not_installed_is_said_with_how_to_get_it(
    local: RunFolder, monkeypatch: pytest.MonkeyPatch, log: dict[str, Any], name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"log asks for {name}.*pip install 'everstep\[{extra}\]'"):
        open_sinks(LogConfig(**log), "demo", local, 1, {})


def test_a_sink_that_cannot_be_opened_is_left_out_and_the_user_is_told(
    local: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("everstep.trainer.reporting.trackers.opening.TensorBoardSink", unreachable)
    with caplog.at_level(logging.WARNING, "everstep"):
        for sink in open_sinks(LogConfig(tensorboard=True), "demo", local, 1, {}):
            sink.log(train(1, 0.5))
            sink.close()
    assert list(read_metrics(local)) == [1]
    said = "TensorBoard cannot be opened, training goes on without it: ConnectionError: no network"
    assert said in caplog.text
    lacks = "TensorBoard lacks 1 records; everstep sync RUN brings them"
    assert capsys.readouterr().err == f"warning: {said}\nwarning: {lacks}\n"


def test_nothing_but_the_runs_own_lines_is_opened_unasked(local: RunFolder) -> None:
    (own,) = open_sinks(LogConfig(), "demo", local, 1, {})
    own.log(train(1, 0.5))
    own.close()
    assert list(read_metrics(local)) == [1]


def test_tensorboard_shows_each_step_once_and_as_it_was_last(local: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    starts = [  # each with the step that it goes on from; the second is killed before its first checkpoint
        (0, [train(1, 1.0), train(2, 0.9), train(3, 0.8)]),
        (0, [train(1, 1.0), train(2, 0.9), {"kind": "evaluate", "step": 2, "loss": 2.0}, train(3, 0.7), train(4, 0.6)]),
        (2, [{**train(3, 0.5), "unit": "tokens", "time": 1.8e9}, train(4, 0.25)]),
    ]
    for step, records in starts:
        sink = TensorBoardSink(local, step=step)
        for record in records:
            sink.log(record)
        sink.close()
    events = EventAccumulator(str(local.storage.path("tensorboard"))).Reload()
    assert sorted(events.Tags()["scalars"]) == ["evaluate/loss", "train/loss"]
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, pytest.approx(0.9)), (3, 0.5), (4, 0.25)]
    assert [event.step for event in events.Scalars("evaluate/loss")] == [2]


def test_a_tracker_gets_each_sample_of_the_node_once_and_the_runs_own_file_none(local: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = [{"cpu_percent": 10.0}, {}, {"cpu_percent": 30.0}, {"cpu_percent": 50.0}]
    own, tracker = JsonLines(local.storage, local.attempt(1, "metrics.jsonl")), TensorBoardSink(local)
    outputs = Outputs(Quiet(), [own, tracker], own, [tracker], lambda: samples.pop(0))
    facts = RunFacts(9, 4, 1, "loss", "samples")
    reporter = Reporter(facts, local, outputs, StartupTimer(0.0), Mesh(RankInfo(), torch.device("cpu")))
    for step in (1, 2, 3):
        reporter.step(StepInfo(step, 0.5, 4, 1.0, 0.1, True, False), 0.0)
    reporter.close()
    events = EventAccumulator(str(local.storage.path("tensorboard"))).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("node/cpu_percent")]
    assert shown == [(1, 10.0), (3, 30.0), (3, 50.0)]  # the last one came after the last step
    assert read_metrics(local, "node") == {}


def test_tensorboard_has_a_table_of_what_trials_have_tried_and_reached(tmp_path: Path) -> None:
    """Asked as its HParams page asks."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.api_pb2 import STATUS_UNKNOWN, ListSessionGroupsRequest
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    for lr, losses in ((0.1, (2.0, 1.5)), (0.01, (3.0, 1.0))):
        for step, loss in enumerate(losses, start=1):  # each of another start
            hparams = {"optimizer.lr": lr, "clip": None, "optimizer": "sgd"}
            sink = TensorBoardSink(RunFolder(str(tmp_path / f"lr={lr}")), hparams)
            sink.log({"kind": "evaluate", "step": step, "loss": loss})
            sink.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    asked = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path))))
    request = ListSessionGroupsRequest(allowed_statuses=[STATUS_UNKNOWN], slice_size=9)
    groups = Handler(RequestContext(), asked, "", request).run().session_groups
    rows = {
        group.hparams["optimizer.lr"].number_value: (
            group.hparams["clip"].string_value,
            group.hparams["optimizer"].string_value,
            {metric.name.tag: metric.value for metric in group.metric_values},
        )
        for group in groups
    }
    assert rows == {
        0.1: ("null", "sgd", {"evaluate/loss": 1.5}),
        0.01: ("null", "sgd", {"evaluate/loss": 1.0}),
    }


@pytest.mark.process
def test_starts_of_a_run_are_one_run_of_wandb_with_each_step_once(
    local: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    options = WandbConfig(enabled=True, mode="offline", project="tests")
    evaluated = {"kind": "evaluate", "step": 20, "mae": 3.0}
    node = {"kind": "node", "step": 30, "time": 1.8e9, "gpu0_power_w": 250.0}
    starts = [
        ([train(10, 1.0), train(20, 0.5)], [{"step": 10, "train/loss": 1.0}, {"step": 20, "train/loss": 0.5}]),
        ([train(20, 0.5), evaluated, {**train(30, 0.25), "unit": "tokens", "time": 1.8e9}, node],
         [{"step": 20, "evaluate/mae": 3.0}, {"step": 30, "train/loss": 0.25, "node/gpu0_power_w": 250.0}]),
        ([train(20, 0.5), evaluated, train(30, 0.25), node, train(40, 0.125)], [{"step": 40, "train/loss": 0.125}]),
    ]  # fmt: skip
    known: set[Path] = set()
    for records, wanted in starts:
        sink = WandbSink(options, "demo", local, {"steps": 40})
        for record in records:
            sink.log(record)
        sink.close()
        (file,) = set(Path(local.url).rglob("*.wandb")) - known
        known.add(file)
        assert file.name == f"run-{json.loads(local.storage.read('wandb.json'))['id']}.wandb"
        # W&B's own process writes the file, within a second or so.
        until(lambda file=file, wanted=wanted: own(file) == wanted)  # type: ignore[misc]
        assert [row["_step"] for row in rows(file)] == [row["step"] for row in wanted]


def own(file: Path) -> list[dict[str, Any]]:
    """Its rows without W&B's own columns."""
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows(file)]


def test_a_file_of_wandb_that_a_kill_has_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    content = b"\0" * 7
    for step in range(1, 2000):
        record = wandb_internal_pb2.Record()
        for key, value in (("step", step), ("train/loss", 0.5)):
            item = record.history.item.add()
            item.key, item.value_json = key, json.dumps(value)
        content = in_blocks(content, record.SerializeToString())
    file = tmp_path / "wandb" / "offline-run-1" / "run-x.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert [row["step"] for row in rows(file)] == list(range(1, 2000))
    file.write_bytes(content[:-3])
    assert last_steps(tmp_path, "x") == {"train": 1998}
    assert last_steps(tmp_path, "y") == {}


def in_blocks(content: bytes, record: bytes) -> bytes:
    """The content with a record after it, in as many parts as blocks that it touches."""
    part = 1
    while True:
        if (left := 32768 - len(content) % 32768) < 7:
            content, left = content + b"\0" * left, 32768
        piece, record = record[: left - 7], record[left - 7 :]
        kind = (1 if not record else 2) if part == 1 else (4 if not record else 3)
        content += struct.pack("<IHB", 0, len(piece), kind) + piece
        if not record:
            return content
        part += 1


def test_a_disk_that_is_full_for_a_while_loses_no_record(
    local: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes half a line, then nothing, then all."""
    lines = JsonLines(local.storage, local.attempt(local.claim({}), "metrics.jsonl"))
    lines.log(train(1, 0.5))
    write_, left = os.write, [10]

    def full(file: int, data: bytes) -> int:
        taken = write_(file, data[: left[0]]) if left[0] else 0
        left[0] = 0
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for step in (2, 3, 4):
            lines.log(train(step, 0.1))
    assert capsys.readouterr().err.count("No space left on device") == 1
    lines.log(train(5, 0.1))
    lines.close()
    assert list(read_metrics(local)) == [1, 2, 3, 4, 5]


def test_a_disk_that_stays_full_takes_a_bounded_part_of_memory(
    local: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = JsonLines(local.storage, local.attempt(local.claim({}), "metrics.jsonl"))
    monkeypatch.setattr("everstep.trainer.reporting.sinks.LARGEST_BACKLOG", 2000)
    with monkeypatch.context() as patched:
        patched.setattr(lines, "_append", lambda: False)
        for step in range(1, 1000):
            lines.log(train(step, 0.1))
        assert len(lines._backlog) <= 2000
    lines.close()
    steps = list(read_metrics(local))
    assert steps == list(range(steps[0], 1000))  # the newest are kept


def test_a_sink_that_has_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ill(Fragile):
        def log(self, record: object) -> None:
            self.calls += 1
            if self.calls == 1:
                raise OSError("away")

    ill = Ill()
    sink = Guarded("W&B", ill)
    monkeypatch.setattr("everstep.trainer.reporting.sinks.AGAIN_S", 0.0)
    for step in range(3):
        sink.log(train(step, 1.0))
    assert ill.calls == 3


def test_the_line_of_an_evaluation_counts_the_cells_of_a_matrix() -> None:
    matrix = {f"confusion/{row}/{column}": 1.0 for row in range(4) for column in range(4)}
    assert folded({"loss": 0.5, "f1/0": 0.25, "f1/1": 0.75, **matrix}) == [
        "loss 0.5", "f1/0 0.25", "f1/1 0.75", "confusion (16 values)",
    ]  # fmt: skip
    assert folded({f"night/{name}": 1.0 for name in "abcdefghijklm"})[0] == "night/a 1"
