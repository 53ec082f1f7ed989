"""A checkpoint that is not what was written is never loaded: it is walked past, set aside and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_lines
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist
KEEP = ("checkpoint.keep_last=9", "checkpoint.keep_best=0")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 12 steps with the checkpoints of steps 4, 8 and 12."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(2, root, *KEEP).codes == [0, 0]
    return root


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """The same run as it was when steps 4 and 8 were saved and nothing later."""
    shutil.copytree(undisturbed / "toy", tmp_path / "toy")
    shutil.rmtree(tmp_path / "toy/checkpoints/step-00000012-attempt-0001")
    (tmp_path / "toy/attempts/0001/outcome.json").unlink()
    return tmp_path


def checkpoint(root: Path, step: int) -> Path:
    return root / f"toy/checkpoints/step-{step:08d}-attempt-0001"


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, remove, empty])
@pytest.mark.parametrize("name", ["rank-0000.tensors", "rank-0001.tensors", "tensors.json"])
def test_a_damaged_file_sends_the_run_back_to_the_checkpoint_before(
    undisturbed: Path, stopped: Path, harm: Callable[[Path], None], name: str
) -> None:
    harm(checkpoint(stopped, 8) / name)
    ended = train(2, stopped, *KEEP)
    assert ended.codes == [0, 0], ended.printed
    walked = [event for event in read_lines(folder(stopped), "events.jsonl") if event["event"] == "walked_past"]
    assert len(walked) == 1
    assert name in walked[0]["line"]
    assert (checkpoint(stopped, 8) / "manifest.set-aside.json").exists()
    assert ledger(stopped) == ledger(undisturbed)
    assert list(differences(locate(folder(stopped).url), locate(folder(undisturbed).url))) == []


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, empty])
def test_a_damaged_manifest_sends_the_run_back_too(
    undisturbed: Path, stopped: Path, harm: Callable[[Path], None]
) -> None:
    harm(checkpoint(stopped, 8) / "manifest.json")
    ended = train(2, stopped, *KEEP)
    assert ended.codes == [0, 0], ended.printed
    assert list(differences(locate(folder(stopped).url), locate(folder(undisturbed).url))) == []


def test_a_checkpoint_without_manifest_does_not_exist(undisturbed: Path, stopped: Path) -> None:
    (checkpoint(stopped, 8) / "manifest.json").unlink()
    assert train(2, stopped, *KEEP).codes == [0, 0]
    restored = json.loads((stopped / "toy/attempts/0002/restored.json").read_text())
    assert restored == {"step": 4, "attempt": 1}
    assert list(differences(locate(folder(stopped).url), locate(folder(undisturbed).url))) == []


def test_with_no_good_checkpoint_left_the_run_says_so_and_touches_nothing(stopped: Path) -> None:
    for step in (4, 8):
        flip_a_bit(checkpoint(stopped, step) / "rank-0000.tensors")
    before = sorted(path for path in (stopped / "toy/checkpoints").rglob("*"))
    for _ in range(2):
        ended = train(2, stopped, *KEEP)
        assert ended.codes == [2, 2]
        assert ended.printed.count("error:") == 1
        assert "none can be restored" in ended.printed
        assert "Traceback" not in ended.printed
    assert sorted((stopped / "toy/checkpoints").rglob("*")) == before


def test_a_run_whose_checkpoints_vanished_does_not_start_from_nothing(stopped: Path) -> None:
    shutil.rmtree(stopped / "toy/checkpoints")
    ended = train(2, stopped, *KEEP)
    assert ended.codes == [2, 2]
    assert "all are gone" in ended.printed


def test_a_checkpoint_of_another_dataset_is_refused(stopped: Path) -> None:
    ended = train(2, stopped, *KEEP, "data.seed=1", "resume.allow=[data]")
    assert ended.codes == [2, 2]
    assert "another dataset" in ended.printed


def test_a_new_run_may_start_from_the_weights_of_another(undisturbed: Path, tmp_path: Path) -> None:
    source = undisturbed / "toy"
    ended = train(2, tmp_path, f"init_from={source}", "steps=1", "optimizer.lr=0.0", "parallel=fsdp", run="next")
    assert ended.codes == [0, 0], ended.printed
    apart = [
        difference.name
        for difference in differences(locate(str(source)), locate(folder(tmp_path, "next").url))
        if difference.name.startswith("model.")
    ]
    assert apart == []
