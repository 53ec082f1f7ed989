"""6 steps straight against the same run resumed from its checkpoint of step 3: the same bits, or the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole
from everstep.trainer.checkpoint.tools.diff import differences
from support.ranks import Ranks, folder, train

PLACES = [(1, "single"), (2, "ddp"), (2, "fsdp")]
IDS = ["single", "ddp", "fsdp"]


def zoo(world: int, root: Path, kind: str, *overrides: str, side: str = "straight") -> Ranks:
    """Train a model of the zoo in `root/side`."""
    (root / side).mkdir(exist_ok=True)
    return train(world, root / side, "experiment=zoo", f"parallel={kind}", *overrides, run="zoo")


def assert_resumes(world: int, root: Path, kind: str, *overrides: str, first: bool = True) -> None:
    """Train 6 steps, and 3 more from the checkpoint of step 3 in a copy of the folder; both end with the same bits."""
    if first:
        straight = zoo(world, root, kind, *overrides)
        assert straight.codes == [0] * world, straight.printed
    cut_off(root)
    again = zoo(world, root, kind, *overrides, side="resumed")
    assert again.codes == [0] * world, again.printed
    assert changed(root) == []


def cut_off(root: Path) -> None:
    """Make the side `resumed`: the straight one as it was when step 3 had just been saved."""
    shutil.rmtree(root / "resumed", ignore_errors=True)
    shutil.copytree(root / "straight", root / "resumed")
    run = root / "resumed/zoo"
    for path in [*run.glob("checkpoints/step-00000006*"), *run.glob("attempts/*/outcome*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def changed(root: Path) -> list[str]:
    return [found.name for found in differences(*(last(root, side) for side in ("straight", "resumed")))]


def last(root: Path, side: str) -> tuple:  # type: ignore[type-arg]
    path = max(path.name for path in (root / side / "zoo/checkpoints").iterdir())
    return folder(root / side, "zoo"), f"checkpoints/{path}"


def state(root: Path, side: str) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    where, path = last(root, side)
    metadata = read_metadata(where.storage, path)
    return {name: read_whole(where.storage, path, metadata, name) for name in metadata.state_dict_metadata}


def values(root: Path, side: str) -> dict:  # type: ignore[type-arg]
    """What the manifest of the newest checkpoint holds that is no tensor."""
    where, path = last(root, side)
    found: dict = json.loads(where.storage.read(f"{path}/manifest.json"))["values"]  # type: ignore[type-arg]
    return found


def training_records(root: Path, side: str) -> list[dict]:  # type: ignore[type-arg]
    """The records of training steps, of the newest attempt."""
    where = root / side / "zoo/attempts"
    lines = (max(where.iterdir()) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]
