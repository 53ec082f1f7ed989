"""`everstep compare` and `everstep sync`: two runs side by side, and a run brought into a tracker."""

from __future__ import annotations

import argparse
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from everstep.config import LogConfig, RunConfig
from everstep.frozen_config import freeze
from everstep.launch.__main__ import main
from everstep.launch.submit import snapshot
from everstep.run_folder import METRICS, RunFolder
from everstep.trainer.reporting.trackers import sync as syncing


def made(url: str, records: list[dict[str, Any]], code: str | None = None, **keys: Any) -> RunFolder:
    folder = RunFolder(url)
    config = RunConfig(run=url.rpartition("/")[2], **keys)
    folder.storage.write("config.yaml", freeze(config).encode())
    folder.storage.write("data.json", json.dumps({"digest": "d" + str(config.seed)}).encode())
    facts = {"packages": {"torch": f"2.{config.seed}", "numpy": "2"}, "python": "3.11.7"}
    folder.storage.write("provenance.json", json.dumps(facts).encode())
    if code is not None:
        folder.storage.write("submissions/0001.json", json.dumps({"code": code}).encode())
    number = folder.claim({})
    folder.storage.write(folder.attempt(number, METRICS), "".join(json.dumps(r) + "\n" for r in records).encode())
    return folder


RECORDS = [
    {"kind": "train", "step": 10, "loss": 1.0, "time": 1.8e9},
    {"kind": "evaluate", "step": 10, "loss": 0.5, "time": 1.8e9},
    {"kind": "train", "step": 20, "loss": 0.75, "time": 1.8e9},
    {"kind": "evaluate", "step": 20, "loss": 0.625, "time": 1.8e9},
]


@pytest.mark.parametrize("root", ["local", "memory"])
def test_all_that_differs_between_two_runs_is_told_falsehoods_too(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(tmp_path) if root == "local" else f"memory://{uuid.uuid4().hex}"
    made(f"{base}/a", RECORDS)
    made(f"{base}/b", RECORDS[:2], seed=1, log=LogConfig(tensorboard=True), clip=None)
    assert main(["compare", f"{base}/a", f"{base}/b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"clip": [1.0, None], "log.tensorboard": [False, True], "seed": [0, 1]}
    assert found["packages"] == {"torch": ["2.0", "2.1"]}
    assert found["data"] == {"digest": ["d0", "d1"]}
    assert found["figures"]["best/loss"] == [0.5, 0.5]
    assert found["figures"]["best/step"] == [10, 10]
    assert found["figures"]["evaluate/loss"] == [0.625, 0.5]
    assert found["figures"]["train/loss"] == [0.75, 1.0]
    assert main(["compare", f"{base}/a", f"{base}/b"]) == 0
    shown = capsys.readouterr().out
    assert "  log.tensorboard: false → true\n" in shown
    assert "code: the same\n" in shown


def test_the_code_of_two_submissions_is_compared_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    monkeypatch.chdir(checkout)
    for name, line in (("a", "lr = 1"), ("b", "lr = 2")):
        (checkout / "mine.py").write_text(f"import torch\n{line}\n")
        folder = RunFolder(str(tmp_path / name))
        kept = snapshot.take(folder, checkout)
        assert kept is not None
        made(str(tmp_path / name), RECORDS, code=kept.digest)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    code = json.loads(capsys.readouterr().out)["code"]
    assert code == ["--- a/mine.py", "+++ b/mine.py", "@@ -1,2 +1,2 @@", " import torch", "-lr = 1", "+lr = 2"]


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_run_that_is_synced_twice_is_there_once(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip(tracker)
    folder = made(str(tmp_path / "a"), RECORDS)
    second = folder.claim({})
    replayed = {"kind": "train", "step": 20, "loss": 0.25, "time": 1.8e9}
    folder.storage.write(folder.attempt(second, METRICS), json.dumps(replayed).encode() + b"\n")
    for _ in range(2):
        assert syncing.sync(argparse.Namespace(run=folder.url, to=tracker)) == 0
    read = read_tensorboard if tracker == "tensorboard" else read_mlflow
    assert read(folder, "train/loss") == [(10, 1.0), (20, 0.25)]
    assert read(folder, "evaluate/loss") == [(10, 0.5), (20, 0.625)]


def read_tensorboard(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{folder.url}/tensorboard").Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def read_mlflow(folder: RunFolder, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=Path(folder.url, "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("everstep").experiment_id])
    return sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, key))


@pytest.mark.process
def test_a_run_that_is_synced_twice_into_wandb_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from everstep.trainer.reporting.trackers.wandb_sink import rows
    from support.processes import until

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    folder = made(str(tmp_path / "a"), RECORDS)
    files = lambda: sorted(Path(folder.url).rglob("*.wandb"))  # noqa: E731
    for _ in range(2):
        assert syncing.sync(argparse.Namespace(run=folder.url, to="wandb")) == 0
        until(lambda: sum(len(list(rows(file))) for file in files()) == 2)
    found = [row for file in files() for row in rows(file)]
    assert [(row["step"], row["train/loss"], row["evaluate/loss"]) for row in found] == [
        (10, 1.0, 0.5),
        (20, 0.75, 0.625),
    ]


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(str(tmp_path / "a"), RECORDS)
    assert main(["sync", str(tmp_path / "a"), "--to", "wanbd"]) == 2
    assert "wandb" in capsys.readouterr().err
