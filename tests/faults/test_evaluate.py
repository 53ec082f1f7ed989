"""`everstep evaluate` and `everstep predict`: the same figures and rows on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from everstep.run_folder import RunFolder
from everstep.trainer.reporting.sinks import read_metrics
from support.processes import until

DIGITS = ("experiment=digits", "precision=fp64", "steps=12", "evaluate.every=12", "log.every=4")


def everstep(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "everstep.launch", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def evaluated(*words: str, cwd: Path) -> dict[str, Any]:
    ended = everstep("evaluate", *words, "--json", cwd=cwd)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout[ended.stdout.index("{") :])
    return found


def values(facts: Mapping[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in facts["metrics"].items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one`, and `two` with another seed, of twelve steps."""
    root = tmp_path_factory.mktemp("runs")
    for run, seed in (("one", 1), ("two", 2)):
        ended = everstep("run", *DIGITS, f"run={run}", f"seed={seed}", "job.nproc=1", cwd=root)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    more = ("parallel=fsdp", "job.nproc=2", "evaluate.limit=64", "exclude=[{from_step: 1, samples: [3, 5]}]")
    ended = everstep("run", *DIGITS, "run=sharded", *more, cwd=root)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return root


pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]


def test_evaluation_gives_the_figures_of_training_on_one_and_two_processes_whole_and_by_slices(trained: Path) -> None:
    recorded = read_metrics(RunFolder(str(trained / "runs/one")), "evaluate")[12]
    one = evaluated("one", "--by", "label", cwd=trained)
    two = evaluated("one@12", "--by", "label", "job.nproc=2", cwd=trained)
    assert (one["step"], one["world"], two["world"]) == (12, 1, 2)
    whole = one["sets"]["validation"]
    for name in ("loss", "accuracy"):
        assert values(whole)[name] == pytest.approx(recorded[name], rel=1e-9)
        assert whole["metrics"][name]["low"] < values(whole)[name] < whole["metrics"][name]["high"]
    for facts, other in [(whole, two["sets"]["validation"])]:
        assert values(other) == pytest.approx(values(facts), rel=1e-9)
        assert [*facts["slices"]] == [*other["slices"]] == [str(digit) for digit in range(10)]
        for label, part in facts["slices"].items():
            assert part["samples"] == other["slices"][label]["samples"]
            assert values(other["slices"][label]) == pytest.approx(values(part), rel=1e-9)
    parts = whole["slices"].values()
    assert sum(part["samples"] for part in parts) == whole["samples"]
    total = sum(values(part)["loss"] * part["samples"] for part in parts)
    assert total / whole["samples"] == pytest.approx(values(whole)["loss"], rel=1e-9)
    stored = trained / "runs/one/evaluations"
    assert [json.loads((stored / name / "result.json").read_text())["step"] for name in ("0001", "0002")] == [12, 12]


def test_two_runs_are_compared_on_the_same_samples(trained: Path) -> None:
    found = evaluated("one", "--against", "two", cwd=trained)
    mine, other = found["sets"]["validation"], found["against"]["sets"]["validation"]
    alone = evaluated("two", cwd=trained)["sets"]["validation"]
    assert values(other) == values(alone)
    difference = other["differences"]["accuracy"]
    assert difference["value"] == pytest.approx(values(mine)["accuracy"] - values(alone)["accuracy"], rel=1e-9)
    assert difference["low"] <= difference["value"] <= difference["high"]
    same = evaluated("one", "--against", "one@best", cwd=trained)["against"]["sets"]["validation"]["differences"]
    assert set(same["loss"].values()) == {0.0}


HALF = """from everstep import Splits, Subset
from everstep.data import digits


def half() -> Splits:
    found = digits()
    return Splits(found.train, Subset(found.validation, range(100)))
"""


def test_other_data_is_a_word_of_the_command(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "half_digits.py").write_text(HALF)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(trained), os.environ.get("PYTHONPATH", "")]))
    found = evaluated("one", "data={_target_: half_digits.half}", "plugins=[half_digits]", cwd=trained)
    assert found["sets"]["validation"]["samples"] == 100
    assert found["data_digest"] != evaluated("one", cwd=trained)["data_digest"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "one@77"), "one@77: there is no such checkpoint; there are 12"),
        (("evaluate", "one", "--on", "tests"), "--on tests: the data has no such set; there are validation, train"),
        (
            ("evaluate", "one", "--by", "colour"),
            "--by colour: the data has no such column; there are baseline, image, label",
        ),
        (("evaluate", "one", "--by", "image"), "choose a column of one value"),
        (("evaluate", "one", "job.nodes=2"), "job.nodes=2: evaluate runs on this machine alone"),
        (("predict", "one", "--out", "p", "job=slurm"), "job=slurm: predict runs on this machine alone"),
        (("evaluate", "one", "optimizer.lr=1"), "optimizer.lr=1: evaluate takes changes of data, evaluate"),
        (("evaluate", "onne"), "did you mean 'one'?"),
        (("predict", "one", "--out", "p", "--rows", "0"), "--rows 0: a part has at least one row"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_write(trained: Path, words: tuple[str, ...], said: str) -> None:
    ended = everstep(*words, cwd=trained)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    for stored in (trained / "runs/one/evaluations").glob("*"):  # a refused one leaves nothing
        assert (stored / "result.json").exists()


def rows(folder: Path) -> pa.Table:
    return parquet.read_table(folder).sort_by("sample")


def killed_after(parts: int, *words: str, cwd: Path) -> int:
    """Kill a prediction into the folder `cut` with all its processes, once it has more parts; return their number."""
    process = subprocess.Popen(
        [sys.executable, "-m", "everstep.launch", *words],
        cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    until(lambda: process.poll() is not None or len([*(cwd / "cut").glob("part-*")]) > parts, 60)
    subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)
    process.wait()
    return len([*(cwd / "cut").glob("part-*")])


def test_a_prediction_that_was_killed_goes_on_elsewhere_and_each_sample_is_there_once(trained: Path) -> None:
    words = ("predict", "one", "--on", "train", "--rows", "10")
    assert everstep(*words, "--out", "whole", cwd=trained).returncode == 0
    whole = rows(trained / "whole")
    assert whole["sample"].to_pylist() == list(range(len(whole)))
    parts = [
        killed_after(20 * turn, *words, "--out", "cut", f"job.nproc={turn % 2 + 1}", cwd=trained) for turn in range(3)
    ]
    assert parts[0] < len(whole) // 10
    ended = everstep(*words, "--out", "cut", "job.nproc=2", cwd=trained)
    assert ended.returncode == 0, ended.stderr
    cut = rows(trained / "cut")
    assert cut.equals(whole)
    assert np.array(whole["probability"].to_pylist()).sum(axis=1) == pytest.approx(1.0)


def test_a_sharded_model_predicts_parts_of_unequal_length(trained: Path) -> None:
    words = ("predict", "sharded", "--on", "validation", "--rows", "100", "evaluate.batch=16")
    for out, world in (("parts-one", 1), ("parts-two", 2), ("parts-three", 3)):
        ended = everstep(*words, "--out", out, f"job.nproc={world}", cwd=trained)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    one = rows(trained / "parts-one")
    for out in ("parts-two", "parts-three"):
        other = rows(trained / out)
        assert other["label"].equals(one["label"])
        assert other["sample"].to_pylist() == list(range(len(one)))


def test_predictions_of_another_checkpoint_or_set_are_not_mixed(trained: Path) -> None:
    assert everstep("predict", "one", "--out", "mixed", cwd=trained).returncode == 0
    ended = everstep("predict", "one", "--out", "mixed", "--on", "train", cwd=trained)
    assert ended.returncode == 2
    assert "mixed: its predictions are of on=validation, not train; choose another folder" in ended.stderr
    shutil.rmtree(trained / "mixed/_everstep")
    ended = everstep("predict", "one", "--out", "mixed", cwd=trained)
    assert ended.returncode == 2
    assert "part-000000.parquet is there, of an unknown prediction" in ended.stderr


def test_a_run_with_less_evaluation_in_training_is_evaluated_whole_unless_asked(trained: Path) -> None:
    assert evaluated("sharded", cwd=trained)["sets"]["validation"]["samples"] == 359
    assert evaluated("sharded", "evaluate.limit=50", cwd=trained)["sets"]["validation"]["samples"] == 50


def test_excluded_samples_are_left_out_of_the_training_set_and_counted(trained: Path) -> None:
    found = evaluated("sharded", "--on", "train", "--by", "label", cwd=trained)["sets"]["train"]
    assert (found["samples"], found["left_out"]) == (1436, 2)
    assert sum(part["samples"] for part in found["slices"].values()) == 1436
