"""Replay: a checkpoint comes from an earlier one by this data, config and code, or what speaks against it is named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everstep.frozen_config import freeze, thaw
from everstep.run_folder import CONFIG, MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import Committed, Manifest, candidates, record_of
from everstep.trainer.command import verb
from everstep.trainer.stop import Stop
from everstep.trainer.worker import attempt
from support.ranks import Ranks, folder, start, train
from support.shard_datasets import write_dataset
from support.toy import WIDTH

pytestmark = pytest.mark.dist
TASK = "from support.toy import ToyTask\n\nclass MyTask(ToyTask):\n    pass\n"


def here(root: Path) -> None:
    sys.path.insert(0, str(root))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a task of the user's on prepared shards: on two processes to step 4, on one from there to step 12."""
    root = tmp_path_factory.mktemp("replay")
    (root / "mine.py").write_text(TASK)
    x = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)
    write_dataset(root / "set", [20, 20], {"x": x, "y": np.sin(x.sum(axis=1)).astype(np.float32)})
    words = ["data._target_=everstep.data.prepared", f"data.path={root / 'set'}", "plugins=[support.toy,mine]"]
    words += ["task._target_=mine.MyTask", "evaluate.every=null", "checkpoint.keep_last=9"]
    for world, steps in ((2, 4), (1, 12)):
        ended = train(world, root, *words, f"steps={steps}", before=lambda rank: here(root))
        assert ended.codes == [0] * world, ended.printed
    return root


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    """A copy of its folder, with the code; the data is shared, and read only."""
    shutil.copytree(trained / "toy", tmp_path / "toy")
    shutil.copy(trained / "mine.py", tmp_path / "mine.py")
    return tmp_path


def replay(root: Path, first: int, last: int, world: int = 1) -> tuple[int, Mapping[str, Any]]:
    """The exit code and the result, of what `everstep replay` does with its processes."""
    work, run = root / "work", folder(root)
    words = ["replay", str(work), "--source", run.url]
    code = verb([*words, "--first", str(first), "--last", str(last)])
    if code == 0:
        ended = trained_again(root, work / "run", world)
        code = verb([*words, "--ended", str(max(ended.codes))])
    shutil.rmtree(work, ignore_errors=True)
    names = sorted((root / "toy/replays").glob("*.json"))
    return code, json.loads(names[-1].read_text()) if names else {}


def trained_again(root: Path, url: Path, world: int) -> Ranks:
    def work(rank: int) -> int:
        sys.path[:0] = [str(Path(__file__).parent.parent), str(root)]
        stop = Stop()
        stop.listen()
        return attempt(["--frozen", str(url), "--plugins", "support.toy,mine"], stop)

    ended = start(world, work, root / "replay.log")
    assert ended.codes == [0] * world, ended.printed
    return ended


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in (root / "toy").rglob("*")
        if path.is_file() and "replays" not in path.parts
    }


def test_the_same_world_gives_the_same_bits_of_every_tensor_and_the_run_is_left_as_it_was(mine: Path) -> None:
    before = files_of(mine)
    code, result = replay(mine, 4, 12)
    assert (code, result["problems"], result["proved"]) == (0, [], True)
    assert {name.split(".")[0] for name in result["tensors"]} == {"model", "optimizer", "average"}
    assert files_of(mine) == before


def test_another_world_is_no_evidence_to_the_last_bit_and_says_how_far_apart_it_is(mine: Path) -> None:
    code, result = replay(mine, 4, 12, world=2)
    assert (code, result["world"]) == (1, {"then": 1, "now": 2})
    assert 0 < result["largest"]["difference"] < 1e-9
    assert "2 processes in place of 1, so this is no evidence to the last bit" in result["problems"][0]


def test_an_edited_source_file_is_named_even_if_it_computes_the_same(mine: Path) -> None:
    (mine / "mine.py").write_text(f"{TASK}# a comment\n")
    code, result = replay(mine, 8, 12)
    assert (code, result["equal"]) == (1, True)
    assert result["problems"] == ["code: module mine was edited"]


def test_a_checkpoint_that_was_changed_with_all_its_digests_is_not_what_the_steps_give(mine: Path) -> None:
    change(folder(mine), 12, consistently=True)
    code, result = replay(mine, 8, 12)
    assert code == 1
    assert "tensors are not equal to the last bit; the largest difference is" in result["problems"][0]


def change(run: RunFolder, step: int, consistently: bool) -> None:
    """Change one bit of a checkpoint's tensors; consistently: and the digests in its manifest."""
    found = next(each for each in candidates(run) if each.step == step)
    assert isinstance(found, Committed)
    name = next(name for name in found.manifest.files if not name.endswith(".json"))
    data = bytearray(run.storage.read(f"{found.path}/{name}"))
    data[0] ^= 1
    run.storage.write(f"{found.path}/{name}", bytes(data))
    if consistently:
        files = {**found.manifest.files, name: record_of(bytes(data))}
        manifest = Manifest(**{**asdict(found.manifest), "files": files})
        run.storage.write(f"{found.path}/{MANIFEST}", manifest.to_json())


@pytest.mark.parametrize("step", [4, 12])
def test_a_bit_that_flipped_in_either_checkpoint_is_named(mine: Path, step: int) -> None:
    change(folder(mine), step, consistently=False)
    code, result = replay(mine, 4, 12)
    assert code == 1
    assert result["problems"][0].startswith(f"checkpoint checkpoints/step-{step:08d}-attempt-")
    assert "does not match its BLAKE3" in result["problems"][0]


def test_a_bit_that_flipped_in_a_shard_is_named(mine: Path, trained: Path) -> None:
    shard = trained / "set/shard-1.arrow"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-100] + bytes([whole[-100] ^ 4]) + whole[-99:])
        code, result = replay(mine, 4, 12)
    finally:
        shard.write_bytes(whole)
    assert (code, result["proved"]) == (1, False)
    assert "shard-1.arrow is damaged: part 0 of 1 does not match its digest" in result["problems"][0]


@pytest.mark.parametrize("file", [CONFIG, f"attempts/0002/{CONFIG}"])
def test_a_changed_config_key_is_named_in_the_root_and_in_the_attempt(mine: Path, file: str) -> None:
    run = folder(mine)
    config = thaw(run.storage.read(file))
    changed = replace(config, optimizer={**(config.optimizer or {}), "lr": 0.02})
    run.storage.write(file, freeze(changed).encode())
    code, result = replay(mine, 4, 12)
    assert code == 1
    assert any("optimizer.lr" in problem for problem in result["problems"])


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [(5, 12, "--from 5: {run} has no checkpoint of this step; there are 4, 8, 12"), (8, 4, "must be after --from 8")],
)
def test_steps_without_a_checkpoint_are_a_mistake_in_one_line(
    mine: Path, capsys: pytest.CaptureFixture[str], first: int, last: int, message: str
) -> None:
    assert replay(mine, first, last) == (2, {})
    said = capsys.readouterr().err
    assert message.format(run=folder(mine).url) in said
    assert said.count("\n") == 1
