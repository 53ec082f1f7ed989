"""Numbers that are not finite, and memory that is too small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everstep.trainer.reporting.sinks import read_lines, read_metrics
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist


def losses(root: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in read_metrics(folder(root)).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(1, root, "task.depth=1").codes == [0]
    return root


def poisoned_step(root: Path) -> tuple[float, int]:
    """A value of the data that exactly one step of the first epoch meets, and that step."""
    import numpy as np

    from support.toy import toy_data

    columns = toy_data().train.columns  # type: ignore[attr-defined]
    ids = ledger(root)[3]
    return float(np.float32(columns["x"][ids[2], 0])), 3


def nan_in(root: Path) -> str:
    return f"task.nan_value={poisoned_step(root)[0]!r}"


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_a_step_with_nan_changes_nothing_and_the_run_goes_on(
    undisturbed: Path, tmp_path: Path, world: int, kind: str
) -> None:
    # Without augmentation's noise the value is met as it stands in the data.
    plain = ("data._target_=support.toy.plain_data", "steps=4", "ema=null", "log.progress=lines")
    ended = train(world, tmp_path, f"parallel={kind}", nan_in(undisturbed), *plain, "checkpoint.every=1",
                  "checkpoint.keep_last=9")  # fmt: skip
    assert ended.codes == [0] * world, ended.printed
    assert "step 3 gave NaN" in ended.printed
    from everstep.trainer.checkpoint.restore import locate
    from everstep.trainer.checkpoint.tools.diff import differences

    url = folder(tmp_path).url
    before, after = (locate(f"{url}/checkpoints/step-{s:08d}-attempt-0001") for s in (2, 3))
    assert [d.name for d in differences(before, after)] == []
    assert [d.name for d in differences(after, locate(url))] != []


def test_a_run_that_meets_nan_too_often_in_a_row_ends_as_diverged(tmp_path: Path) -> None:
    ended = train(2, tmp_path, "optimizer.lr=1e30", "clip=null", "ema=null", "nonfinite.limit=2", "steps=30")
    assert ended.codes == [3, 3], ended.printed
    assert "nonfinite.limit=2" in ended.printed
    assert json.loads((tmp_path / "toy/attempts/0001/outcome.json").read_text())["outcome"] == "diverged"


def test_nan_now_and_then_does_not_end_a_run(undisturbed: Path, tmp_path: Path) -> None:
    ended = train(
        1, tmp_path, nan_in(undisturbed), "data._target_=support.toy.plain_data", "nonfinite.limit=2", "steps=30"
    )
    assert ended.codes == [0], ended.printed
    bad = [event["step"] for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "nonfinite"]
    assert len(bad) > 2


def test_rolling_back_before_the_first_checkpoint_begins_anew_from_the_seed(undisturbed: Path, tmp_path: Path) -> None:
    ended = train(2, tmp_path, nan_in(undisturbed), "data._target_=support.toy.plain_data", "nonfinite.policy=rollback",
                  "checkpoint.every=50", "steps=5")  # fmt: skip
    assert ended.codes == [0, 0], ended.printed
    back = [event for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "rolled_back"]
    assert [(event["checkpoint"], event["step"]) for event in back] == [(0, 3)]


def test_rolling_back_passes_over_the_steps_since_the_last_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    ended = train(2, tmp_path, nan_in(undisturbed), "data._target_=support.toy.plain_data", "nonfinite.policy=rollback",
                  "checkpoint.every=2", "checkpoint.keep_last=9", "steps=5")  # fmt: skip
    assert ended.codes == [0, 0], ended.printed
    back = [event for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "rolled_back"]
    assert [(event["checkpoint"], event["step"]) for event in back] == [(2, 3)]
    progress = json.loads((tmp_path / "toy/checkpoints/step-00000005-attempt-0001/manifest.json").read_text())[
        "progress"
    ]
    assert progress["passed_over"] == [[3, 3]]
    assert list(ledger(tmp_path)) == [1, 2, 3, 4, 5]


def test_one_process_that_runs_out_of_memory_goes_on_with_half_the_microbatch(tmp_path: Path) -> None:
    ended = train(1, tmp_path, "micro_batch=7", "task.max_batch=2", "evaluate.every=6")
    assert ended.codes == [0], ended.printed
    shrunk = [e["micro_batch"] for e in read_lines(folder(tmp_path), "events.jsonl") if e["event"] == "out_of_memory"]
    assert shrunk == [3, 1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_agree_on_a_smaller_microbatch_and_train_on_the_same_samples(tmp_path: Path, kind: str) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    for root in (whole, short):
        root.mkdir()
    still = ("data._target_=support.toy.plain_data", f"parallel={kind}", "task.dropout=0.0", "micro_batch=4")
    assert train(2, whole, *still).codes == [0, 0]
    first = train(2, short, *still, "task.max_batch=3")
    assert first.codes == [1, 1], first.printed
    assert json.loads((short / "toy/attempts/0001/outcome.json").read_text())["micro_batch"] == 2
    second = train(2, short, *still, "task.max_batch=3", "resume.allow=[task]")
    assert second.codes == [0, 0], second.printed
    assert ledger(short) == ledger(whole)
    assert list(losses(short).values()) == pytest.approx(list(losses(whole).values()), rel=1e-9)
    manifest = json.loads((short / "toy/checkpoints/step-00000012-attempt-0002/manifest.json").read_text())
    assert manifest["progress"]["micro_batch"] == 2
