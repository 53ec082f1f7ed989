"""Objects of torchmetrics give what scikit-learn gives, on any number of processes and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.trainer.reporting.sinks import read_metrics
from support.measured_tasks import columns, expected
from support.ranks import folder, train

pytestmark = pytest.mark.dist
MEASURED = "experiment=measured"
TASKS = "task._target_=support.measured_tasks."


def figures(root: Path, run: str, kind: str) -> dict[int, dict[str, Any]]:
    leave = ("kind", "unit", "time", "items_per_s", "steps_per_s", "data_wait", "memory_mb")
    return {
        step: {key: value for key, value in record.items() if key not in leave}
        for step, record in read_metrics(folder(root, run), kind).items()
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_are_those_of_scikit_learn_with_an_uneven_last_batch(tmp_path: Path, world: int) -> None:
    ended = train(world, tmp_path, MEASURED)
    assert ended.codes == [0] * world, ended.printed
    found = figures(tmp_path, "toy", "evaluate")[12]
    wanted = expected(np.load(tmp_path / "outputs.npy"), columns(43, 1))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_every_figure_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    for world, kind in ((1, "ddp"), (2, "ddp"), (3, "ddp"), (2, "fsdp")):
        ended = train(world, tmp_path, MEASURED, f"parallel={kind}", run=f"{kind}{world}")
        assert ended.codes == [0] * world, ended.printed
    for kind in ("train", "evaluate"):
        first = figures(tmp_path, "ddp1", kind)
        assert first
        for other in ("ddp2", "ddp3", "fsdp2"):
            found = figures(tmp_path, other, kind)
            assert found.keys() == first.keys()
            for step, record in found.items():
                assert record == pytest.approx(first[step], rel=1e-9), (other, kind, step)
    assert set(figures(tmp_path, "ddp1", "train")) == {3, 6, 9, 12}
    assert all("f1" in record for record in figures(tmp_path, "ddp1", "train").values())


def test_a_resume_on_another_world_in_the_middle_of_a_window_changes_no_figure(tmp_path: Path) -> None:
    assert train(1, tmp_path, MEASURED, run="whole").codes == [0]
    assert train(1, tmp_path, MEASURED, "steps=4", "schedule.over_steps=12", run="cut").codes == [0]
    ended = train(2, tmp_path, MEASURED, "steps=12", "schedule.over_steps=12", run="cut")
    assert ended.codes == [0, 0], ended.printed
    whole, cut = figures(tmp_path, "whole", "train"), figures(tmp_path, "cut", "train")
    for step in (6, 9, 12):
        assert cut[step] == pytest.approx(whole[step], rel=1e-9)


def test_several_sets_are_measured_each_and_together(tmp_path: Path) -> None:
    for world in (1, 2):
        ended = train(world, tmp_path, MEASURED, "data._target_=support.measured_tasks.two_sets", run=f"sets{world}")
        assert ended.codes == [0] * world, ended.printed
    one, two = (figures(tmp_path, f"sets{world}", "evaluate")[12] for world in (1, 2))
    assert one == pytest.approx(two, rel=1e-9)
    cells = [f"confusion/{i}/{j}" for i in range(3) for j in range(3)]
    assert sum(one[cell] for cell in cells) == 43
    assert sum(one[f"a/{cell}"] for cell in cells) == 19
    assert all(one[cell] == one[f"a/{cell}"] + one[f"b/{cell}"] for cell in cells)


def test_the_best_checkpoint_is_chosen_by_an_object_of_torchmetrics(tmp_path: Path) -> None:
    assert train(2, tmp_path, MEASURED, "evaluate.every=2").codes == [0, 0]
    best = [e for e in folder(tmp_path).lines(1, "events.jsonl") if e["event"] == "evaluated" and e["best"]]
    values = {step: record["f1"] for step, record in figures(tmp_path, "toy", "evaluate").items()}
    assert values[best[-1]["step"]] == max(values.values())


def test_states_are_no_part_of_a_checkpoint_even_of_a_task_that_is_a_module(tmp_path: Path) -> None:
    ended = train(1, tmp_path, MEASURED, f"{TASKS}ModuleTask")
    assert ended.codes == [0], ended.printed
    for manifest in (tmp_path / "toy/checkpoints").glob("*/manifest.json"):
        text = json.dumps(json.loads(manifest.read_text()))
        assert "train_f1" not in text
        assert "auroc" not in text


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("ForgottenUpdate", "metric 'f1' (BinaryF1Score) was returned without an update: call its update"),
        ("ManyCells", "metric 'confusion' gives 121 numbers (limit 100)"),
        ("ReturnsAList", "task.evaluate returned a list as metric 'outputs': return a number"),
        ("ReturnsACollection", "returned a MetricCollection as metric 'both': return its metrics one by one"),
        ("KeepsAMean", "metric 'mean' (MeanMetric) keeps a mean (mean_value)"),
    ],
)
def test_what_cannot_be_exact_is_refused_before_the_first_step(
    tmp_path: Path, world: int, task: str, said: str
) -> None:
    ended = train(world, tmp_path, MEASURED, f"{TASKS}{task}")
    assert ended.codes == [2] * world, ended.printed
    assert said in ended.printed
    assert not read_metrics(folder(tmp_path))
