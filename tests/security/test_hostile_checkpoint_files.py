"""A checkpoint folder from elsewhere: no link, no file that never ends, and no tensor that is not there."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import CheckpointError, ConfigError, StorageError
from everstep.run_folder import MANIFEST, NESTED, RunFolder
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint.manifest import TENSORS, Damaged, Manifest, candidates, parse_checkpoint
from everstep.trainer.checkpoint.tensor_table import ITEM_BYTES, tiles
from everstep.trainer.command import verb
from support.mutations import check_one_line
from support.saved_checkpoint import reseal, saved

WEIGHT = "model.weight"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", [*NESTED, "config.yaml", "stop", "step", "attempt"])
def test_a_run_folder_with_a_link_is_refused_before_anything_is_read_or_removed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(RunFolder(str(tmp_path / "precious")))
    _, path = saved(RunFolder(str(tmp_path / "run")))
    place = {"step": path, "attempt": "attempts/0001"}.get(name, name)
    link = tmp_path / "run" / place
    if link.exists():
        link.rename(tmp_path / "aside")
    link.symlink_to(tmp_path / "precious" / place)
    before = everything(tmp_path / "precious")
    run = RunFolder(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"{place} is a link to {tmp_path}/precious.*; a run folder holds its own"):
        list(candidates(run))
    for typed in (["ls", run.url], ["verify", run.url], ["rm", run.url, "--older-than-step", "9", "--even-the-newest"]):
        assert verb(["checkpoint", *typed]) == 2
        said = capsys.readouterr().err
        assert "is a link to" in said
        assert said.count("\n") == 1
    assert everything(tmp_path / "precious") == before


def test_nothing_is_removed_through_a_link_that_comes_later(tmp_path: Path) -> None:
    saved(RunFolder(str(tmp_path / "precious")))
    checkpoints, path = saved(RunFolder(str(tmp_path / "run")))
    before = everything(tmp_path / "precious")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "precious" / "checkpoints")
    for doomed in (path, f"{path}/{MANIFEST}"):
        with pytest.raises(StorageError, match="cannot remove "):
            checkpoints.folder.storage.delete(doomed)
    assert everything(tmp_path / "precious") == before


def test_a_link_itself_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "kept")
    LocalStorage(str(tmp_path / "root")).delete("link")
    assert (tmp_path / "kept" / "file").exists()
    assert not (tmp_path / "root" / "link").is_symlink()


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, "rank-0000.tensors"])
def test_a_fifo_in_place_of_a_file_is_an_error_and_not_a_wait(tmp_path: Path, name: str) -> None:
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    (tmp_path / "run" / path / name).unlink()
    os.mkfifo(tmp_path / "run" / path / name)
    with pytest.raises((CheckpointError, StorageError)) as refused:
        checkpoints.restore()
    assert "\n" not in str(refused.value)
    assert verb(["checkpoint", "verify", run.url]) in (1, 2)


def test_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read /dev/zero: it is no regular file"):
        LocalStorage("/dev").read("zero")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="directory"):
        LocalStorage(str(tmp_path)).read("folder")


# ------------------------------------------------------------------------------------------------ pieces of tensors

Table = dict[str, Any]


def halves(table: Table) -> None:
    """Two pieces at one place, whose sizes sum up."""
    piece = table[WEIGHT]["chunks"][0]
    half = {**piece, "sizes": [1, 3], "length": 12}
    table[WEIGHT]["chunks"] = [half, dict(half)]


def overlap(table: Table) -> None:
    piece = table[WEIGHT]["chunks"][0]
    table[WEIGHT]["chunks"] = [{**piece, "offsets": [0, column], "sizes": [2, 2], "length": 16} for column in (0, 1)]


def tensor(table: Table, shape: list[int], *pieces: dict[str, Any]) -> None:
    table["model.zz"] = {"dtype": "float32", "shape": shape, "chunks": list(pieces)}


def piece(shape: list[int], offsets: list[int] | None = None) -> dict[str, Any]:
    zeros = offsets or [0] * len(shape)
    length = 4 * math.prod(shape)
    return {"offsets": zeros, "sizes": shape, "file": "rank-0000.tensors", "start": 0, "length": length}


TABLES: dict[str, Callable[[Table], object]] = {
    "two pieces at one place": halves,
    "pieces that overlap": overlap,
    "4 TiB": lambda t: tensor(t, [1 << 40], piece([1 << 40])),
    "elements that overflow to nothing": lambda t: tensor(t, [1 << 32, 1 << 32]),
    "a shape beyond any memory": lambda t: tensor(t, [1 << 62, 0]),
    "bytes of other tensors again": lambda t: [
        t.update({f"model.z{n}": {"dtype": "float32", "shape": [2, 3], "chunks": [piece([2, 3])]}}) for n in range(99)
    ],
    "many pieces": lambda t: tensor(t, [300_000], *(piece([1], [n]) for n in range(300_000))),
    "a start of 0.5": lambda t: t[WEIGHT]["chunks"][0].update(start=0.5),
    "a length of true": lambda t: t[WEIGHT]["chunks"][0].update(length=True),
    "a length as float": lambda t: t[WEIGHT]["chunks"][0].update(length=24.0),
    "a start that is NaN": lambda t: t[WEIGHT]["chunks"][0].update(start=math.nan),
    "quantized numbers": lambda t: t[WEIGHT].update(dtype="quint8"),
    "a type that is a list": lambda t: t[WEIGHT].update(dtype=["float32"]),
    "a name of 10^6 letters": lambda t: t.update({"n" * 10**6: t[WEIGHT]}),
    "a name of half a character": lambda t: t.update({"\ud800": t[WEIGHT]}),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_whose_pieces_do_not_tile_its_tensors_is_damaged_for_every_reader(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    table = json.loads(run.storage.read(f"{path}/{TENSORS}"))
    TABLES[what](table)
    run.storage.write(f"{path}/{TENSORS}", json.dumps(table).encode())
    reseal(run, path)
    began = time.process_time()
    for typed in (["verify", run.url], ["export", run.url, str(tmp_path / "out")], ["diff", run.url, run.url]):
        assert verb(["checkpoint", *typed]) in (1, 2)
        said = capsys.readouterr()
        assert f"{TENSORS} is damaged" in said.err + said.out
    with pytest.raises(CheckpointError, match=f"{TENSORS} is damaged") as refused:
        checkpoints.restore()
    assert "\n" not in str(refused.value)
    assert time.process_time() - began < 30


def test_a_damaged_table_is_walked_past(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    checkpoints.state.progress.step = 8
    assert checkpoints.save()
    assert checkpoints.finish()
    newest = path.replace("00000004", "00000008")
    table = json.loads(run.storage.read(f"{newest}/{TENSORS}"))
    halves(table)
    run.storage.write(f"{newest}/{TENSORS}", json.dumps(table).encode())
    reseal(run, newest)
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 4
    assert "do not make up its shape" in restored.walked_past[0]


def cuts(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]


@given(dims=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=3), data=st.data())
def test_a_grid_tiles_and_no_longer_when_one_box_is_moved_or_missing(
    dims: list[list[int]], data: st.DataObject
) -> None:
    shape = tuple(map(sum, dims))
    boxes = [
        (tuple(offset for offset, _ in crossing), tuple(size for _, size in crossing))
        for crossing in product(*map(cuts, dims))
    ]
    assert tiles(shape, boxes)
    assert not tiles(shape, [*boxes, boxes[0]])
    chosen = data.draw(st.integers(0, len(boxes) - 1))
    assert not tiles(shape, boxes[:chosen] + boxes[chosen + 1 :])
    other = data.draw(st.sampled_from(boxes))
    if other[0] != boxes[chosen][0]:
        assert not tiles(shape, [*boxes[:chosen], (other[0], boxes[chosen][1]), *boxes[chosen + 1 :]])


def test_the_size_of_every_type_is_torchs_own() -> None:
    for name, size in ITEM_BYTES.items():
        assert getattr(torch, name).itemsize == size
        assert torch.frombuffer(bytearray(16), dtype=getattr(torch, name)).numel() == 16 // size


# ---------------------------------------------------------------------------------------------------- manifests

VALUES = [
    {"model": [1]},
    {"optimizer": {"state": 5}},
    {"attributes": "x"},
    {"frozen": 5},
    {"plugins": {"task": [[[]]]}},
    {"buffers": None},
]


@pytest.mark.parametrize("values", VALUES, ids=lambda values: next(iter(values)))
def test_values_that_do_not_fit_the_state_are_one_line_and_not_a_restart(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    tree = json.loads(run.storage.read(f"{path}/{MANIFEST}"))
    run.storage.write(f"{path}/{MANIFEST}", json.dumps({**tree, "values": {**tree["values"], **values}}).encode())
    try:
        restored = checkpoints.restore()
    except CheckpointError as refused:
        check_one_line(refused)
    else:
        assert restored is not None
        assert restored.step == 4


RECORD = {"bytes": 1, "blake3": ""}
FIELDS: dict[str, dict[str, Any]] = {
    "progress of text": {"progress": {"step": "x"}},
    "progress of half a step": {"progress": {"step": 0.5}},
    "progress that passed over text": {"progress": {"passed_over": ["ab"]}},
    "progress that passed over one": {"progress": {"passed_over": [[1]]}},
    "files of 528.0 bytes": {"files": {TENSORS: {"bytes": 528.0, "blake3": "0"}}},
    "files of -1 bytes": {"files": {TENSORS: {"bytes": -1, "blake3": "0"}}},
    "files with a digest that is a number": {"files": {TENSORS: {"bytes": 1, "blake3": 5}}},
    "a file name of 256 letters": {"files": {TENSORS: RECORD, "n" * 256: RECORD}},
    "a file name of half a character": {"files": {TENSORS: RECORD, "\ud800": RECORD}},
    "a step that is true": {"step": True},
    "a time that is NaN": {"time": math.nan},
    "a time that no calendar has": {"time": 1e30},
    "a time of 400 digits": {"time": 10**400},
    "samples of 400 digits": {"samples": 10**400},
    "a metric of text": {"metric": "1"},
    "a parallel of 10^6 letters": {"parallel": "x" * 10**6},
}  # fmt: skip


@pytest.mark.parametrize("what", FIELDS)
def test_a_manifest_is_typed_to_the_last_field_and_else_damaged(tmp_path: Path, what: str) -> None:
    run = RunFolder(str(tmp_path / "run"))
    _, path = saved(run)
    tree = json.loads(run.storage.read(f"{path}/{MANIFEST}"))
    data = json.dumps({**tree, **FIELDS[what]}).encode()
    with pytest.raises(ValueError, match=r"its|lies outside|the (size|digest) of") as refused:
        Manifest.from_json(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert isinstance(parse_checkpoint(path, 4, 1, data, None), Damaged)
