"""A checkpoint folder from a stranger runs no code, and makes nobody read a file outside of it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from everstep.errors import CheckpointError
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import TENSORS
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tensor_index import read_metadata
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.checkpoint.weights import load_weights
from everstep.trainer.command import verb
from support.saved_checkpoint import reseal, saved

SHARD = "rank-0000.tensors"
SEEN: list[tuple[str, tuple[Any, ...]]] | None = None
"""What the interpreter reports while it is watched: an audit hook cannot be taken off again."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if SEEN is not None and event in ("open", "os.mkdir", "pickle.find_class"):
        SEEN.append((event, arguments))


sys.addaudithook(_watch)


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    global SEEN
    SEEN = seen = []
    try:
        yield seen
    finally:
        SEEN = None


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


class Planted:
    """A saved checkpoint, with a secret next to its run that fits whatever is said of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = RunFolder(str(root / "run"))
        self.checkpoints, self.path = saved(self.run)
        self.folder = root / "run" / self.path
        self.secret = root / "secret"
        self.secret.write_bytes((self.folder / SHARD).read_bytes())
        self.bomb = pickle.dumps(Bomb(root / "boom")) + bytes(4096)  # as long as any file that it stands in for

    def link(self, name: str) -> None:
        """Make a file of the checkpoint a link to the secret, which has the same bytes: every digest fits."""
        self.secret.write_bytes((self.folder / name).read_bytes())
        (self.folder / name).unlink()
        (self.folder / name).symlink_to(self.secret)

    def link_in_a_circle(self) -> None:
        (self.folder / SHARD).unlink()
        (self.folder / SHARD).symlink_to(SHARD)

    def list_also(self, name: str) -> None:
        tree = json.loads((self.folder / MANIFEST).read_text())
        data = self.secret.read_bytes()
        tree["files"][name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}
        (self.folder / MANIFEST).write_text(json.dumps(tree))

    def point_tensors_to(self, name: str) -> None:
        tree = json.loads((self.folder / TENSORS).read_text())
        for entry in tree.values():
            for chunk in entry["chunks"]:
                chunk["file"] = name
        (self.folder / TENSORS).write_text(json.dumps(tree))
        reseal(self.run, self.path)

    def point_tensors_to_an_unlisted_link(self) -> None:
        (self.folder / "also").symlink_to(self.secret)
        self.point_tensors_to("also")

    def put(self, name: str, *, fitting: bool) -> None:
        (self.folder / name).write_bytes(self.bomb)
        if fitting:
            reseal(self.run, self.path)


REFUSED: dict[str, Callable[[Planted], None]] = {
    "a shard that is a link out": lambda p: p.link(SHARD),
    "a table that is a link out": lambda p: p.link(TENSORS),
    "a manifest that is a link out": lambda p: p.link(MANIFEST),
    "a shard that is a link to itself": lambda p: p.link_in_a_circle(),
    "a manifest that lists a file above": lambda p: p.list_also("../../../secret"),
    "a manifest that lists an absolute path": lambda p: p.list_also(str(p.secret)),
    "a manifest that lists its own folder": lambda p: p.list_also("."),
    "a manifest that lists the folder above": lambda p: p.list_also(".."),
    "a manifest that lists no name": lambda p: p.list_also(""),
    "a manifest that lists a name with a zero byte": lambda p: p.list_also("a\0b"),
    "tensors in a file above": lambda p: p.point_tensors_to("../../../secret"),
    "tensors in an absolute path": lambda p: p.point_tensors_to(str(p.secret)),
    "tensors in a file with a zero byte": lambda p: p.point_tensors_to("a\0b"),
    "tensors in a link that nothing lists": lambda p: p.point_tensors_to_an_unlisted_link(),
    "a pickle for a table": lambda p: p.put(TENSORS, fitting=True),
    "a pickle for a manifest": lambda p: p.put(MANIFEST, fitting=False),
}


def readers(planted: Planted) -> list[Callable[[], object]]:
    """All ways in which a checkpoint is read, but the commands."""
    checkpoints: Checkpointer = planted.checkpoints
    weights = checkpoints.state.model
    here = (planted.run, planted.path)
    return [
        checkpoints.restore,
        checkpoints.reload,
        lambda: load_weights(planted.run.url, weights, checkpoints.mesh),
        lambda: load_weights(f"{planted.run.url}/{planted.path}", weights, checkpoints.mesh),
        lambda: list(differences(locate(planted.run.url), here)),
    ]


def check_nothing_happened(planted: Planted, seen: list[tuple[str, tuple[Any, ...]]]) -> None:
    opened = {os.path.realpath(path[0]) for event, path in seen if event == "open" and isinstance(path[0], str | Path)}
    assert any(path.startswith(str(planted.run.storage.path())) for path in opened), "the watch saw nothing"
    assert str(planted.secret) not in opened
    assert not [arguments for event, arguments in seen if event == "pickle.find_class"]
    assert not (planted.root / "boom").exists()


@pytest.mark.parametrize("what", REFUSED)
def test_a_hostile_checkpoint_is_refused_and_nothing_outside_is_read(tmp_path: Path, what: str) -> None:
    planted = Planted(tmp_path)
    REFUSED[what](planted)
    with watched() as seen:
        for read in readers(planted):
            with pytest.raises(CheckpointError) as caught:
                read()
            assert "\n" not in str(caught.value)
        for typed in (["ls"], ["verify"], ["rm", "--older-than-step", "9", "--dry-run"]):
            assert verb(["checkpoint", typed[0], planted.run.url, *typed[1:]]) in (0, 1, 2)
    check_nothing_happened(planted, seen)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.pkl", "tensors.pkl", "tensors.json.pkl"])
def test_pickles_beside_a_sound_checkpoint_are_never_opened(tmp_path: Path, name: str) -> None:
    planted = Planted(tmp_path)
    planted.put(name, fitting=False)
    with watched() as seen:
        for read in readers(planted):
            read()
        for typed in ("ls", "verify"):
            assert verb(["checkpoint", typed, planted.run.url]) == 0
    check_nothing_happened(planted, seen)
    assert str(planted.folder / name) not in {str(path[0]) for event, path in seen if event == "open"}


def test_a_pickle_in_place_of_a_shard_is_but_bytes(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    planted.put(SHARD, fitting=True)
    with watched() as seen:
        for read in readers(planted):
            read()
    check_nothing_happened(planted, seen)


def test_the_planted_pickle_would_go_off(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    with watched() as seen:
        pickle.loads(planted.bomb)
    assert (tmp_path / "boom").exists()
    assert "pickle.find_class" in [event for event, _ in seen]


def test_a_link_that_stays_inside_and_a_linked_run_are_read(tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    (planted.folder / SHARD).rename(planted.folder / "moved")
    (planted.folder / SHARD).symlink_to("moved")
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    assert verb(["checkpoint", "verify", str(tmp_path / "linked")]) == 0
    assert read_metadata(planted.run.storage, planted.path).state_dict_metadata


@pytest.mark.parametrize(
    "fields",
    [{"metric": "[red]"}, {"time": "now"}, {"world": None}, {"parallel": 3}, {"samples": 1.5}, {"data_digest": []}],
)
def test_a_manifest_with_fields_of_other_types_is_damaged_and_listed_so(
    tmp_path: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    planted = Planted(tmp_path)
    tree = json.loads((planted.folder / MANIFEST).read_text())
    (planted.folder / MANIFEST).write_text(json.dumps({**tree, **fields}))
    assert verb(["checkpoint", "ls", planted.run.url]) == 0
    assert f"is damaged: its {next(iter(fields))} is" in capsys.readouterr().out
