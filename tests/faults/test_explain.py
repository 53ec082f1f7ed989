"""`everstep explain` on the six tasks: complete attributions, the same again, and mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest
from pyarrow import parquet

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]

RUNS = {
    "digits": ("steps=4", "job.nproc=1"),
    "breast_cancer": ("steps=4", "parallel=fsdp", "job.nproc=2"),
    "gpt_stdlib": ("model.depth=1", "model.width=32", "evaluate.limit=64", "steps=2", "job.nproc=1"),
    "documents": ("model.width=16", "evaluate.limit=64", "steps=2", "job.nproc=1"),
    "recommendation": ("steps=2", "job.nproc=1"),
    "forecasting": ("steps=2", "job.nproc=1"),
    "glyphs": ("steps=2", "data.last_code=383", "job.nproc=1"),
}
COLUMNS = {
    "digits": {"image"},
    "breast_cancer": {"features"},
    "gpt_stdlib": {"tokens"},
    "documents": {"tokens"},
    "recommendation": {"user"},
    "forecasting": {"past"},
    "glyphs": {"image", "words"},
}
PICTURES = {"image", "features", "past"}


def everstep(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "everstep.launch", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("task", RUNS)
def test_attributions_of_each_task_add_up_to_the_change_of_its_output(tmp_path: Path, task: str) -> None:
    ended = everstep("run", f"experiment={task}", "run=one", *RUNS[task], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    ended = everstep("explain", "one", "--samples", "2,5", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "runs/one/explain/0001"
    facts = json.loads((folder / "result.json").read_text())
    assert facts["samples"] == [2, 5]
    assert {*facts["columns"]} == COLUMNS[task]
    table = parquet.read_table(folder / "attributions.parquet")
    for column in COLUMNS[task]:
        for sample in (2, 5):
            rows = table.filter((pc.field("sample") == sample) & (pc.field("column") == column))
            total, change = sum(rows["attribution"].to_pylist()), rows["output"][0].as_py()
            change -= rows["baseline_output"][0].as_py()
            assert total == pytest.approx(change, rel=0.05, abs=1e-3)
            assert any(rows["attribution"].to_pylist())
        pictures = sorted(path.name for path in folder.glob(f"{column}-*.png"))
        assert pictures == ([f"{column}-0000000{n}.png" for n in (2, 5)] if column in PICTURES else [])


def test_it_gives_the_same_again_and_a_mistake_is_one_line_that_leaves_nothing(tmp_path: Path) -> None:
    ended = everstep("run", "experiment=breast_cancer", "run=one", "steps=2", "job.nproc=1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for method in ("occlusion", "occlusion"):
        ended = everstep("explain", "one@best", "--samples", "3", "--method", method, "--target", "1", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "runs/one/explain"
    for name in ("attributions.parquet", "features-00000002.png"):
        assert (folder / "0001" / name).read_bytes() == (folder / "0002" / name).read_bytes()
    for words, said in (
        (("--samples", "many"), "--samples many: give a number of samples"),
        (("--samples", "3,900"), "--samples 3,900: there is no sample 900"),
        (("--target", "2"), "--target 2: the model has 2 outputs (0 to 1)"),
        (("--points", "1"), "--points 1: a path has at least 2 points"),
    ):
        ended = everstep("explain", "one", *words, cwd=tmp_path)
        assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (2, 1), ended.stderr
        assert said in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["0001", "0002"]


def test_other_verbs_do_not_load_captum() -> None:
    code = (
        "import sys, everstep.trainer.command as c; c._parser(); "
        "import everstep.trainer.inference.evaluation, everstep.trainer.inference.prediction; "
        "print([name for name in ('captum', 'matplotlib') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
