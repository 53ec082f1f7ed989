"""Which checkpoints exist, which count, which are kept; and that a hostile one is refused and runs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.errors import CheckpointError, DataError
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import (
    TENSORS,
    Damaged,
    FileRecord,
    Manifest,
    candidates,
    find_fault,
    folders,
    parse_name,
    set_aside,
    was_set_aside,
)
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.retention import to_keep
from everstep.trainer.checkpoint.tensor_index import parse_metadata, read_metadata
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.checkpoint.weights import load_weights
from support.saved_checkpoint import newest_step, reseal, saved


def manifest(step: int = 4, attempt: int = 1, metric: float | None = None) -> Manifest:
    return Manifest(
        step=step, attempt=attempt, samples=step * 8, world=2, parallel="ddp", time=0.0, config_digest="c",
        data_digest="d", progress={"step": step}, values={}, metric=metric, files={TENSORS: FileRecord(0, "0")},
    )  # fmt: skip


def commit(run: RunFolder, step: int, attempt: int, data: bytes | None = None) -> str:
    path = run.checkpoint(step, attempt)
    run.storage.write(f"{path}/{MANIFEST}", manifest(step, attempt).to_json() if data is None else data)
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------- names, order, lineage


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("step-00000012-attempt-0003", (12, 3)), ("step-123456789-attempt-12345", (123456789, 12345)),
        ("step-12", None), ("step-x-attempt-1", None), ("step-1-attempt-", None), ("step--1-attempt-1", None),
        ("epoch-1-attempt-1", None), ("step-1-attempt-1-old", None), ("", None), ("tmp", None),
    ],
)  # fmt: skip
def test_a_folders_name_says_step_and_attempt(name: str, parsed: tuple[int, int] | None) -> None:
    assert parse_name(name) == parsed


def test_the_name_that_the_run_folder_gives_is_the_one_that_is_parsed(run: RunFolder) -> None:
    for step, attempt in ((0, 1), (99999999, 9999), (10**10, 10**5)):
        assert parse_name(run.checkpoint(step, attempt).split("/")[-1]) == (step, attempt)


def test_candidates_come_newest_first_by_number_and_only_with_a_manifest(run: RunFolder) -> None:
    for step, attempt in ((8, 1), (100, 1), (8, 2), (100000000, 2)):
        commit(run, step, attempt)
    run.storage.write(f"{run.checkpoint(200, 2)}/rank-0000.tensors", b"half-written")
    run.storage.write("checkpoints/notes.txt", b"")
    assert [(c.step, c.attempt) for c in candidates(run)] == [(100000000, 2), (100, 1), (8, 2), (8, 1)]
    assert len(folders(run)) == 5


def test_a_late_commit_of_a_superseded_attempt_does_not_count(run: RunFolder) -> None:
    assert [run.claim({}) for _ in range(3)] == [1, 2, 3]
    commit(run, 4, 1)
    run.record_restored(2, 4, 1)
    commit(run, 8, 1)  # attempt 1 lives on beyond a cut network
    commit(run, 6, 2)
    assert [(c.step, c.attempt) for c in candidates(run)] == [(6, 2), (4, 1)]
    run.record_restored(3, 4, 1)  # and 6 of attempt 2 was damaged, so 3 went back to 4
    commit(run, 5, 3)
    assert [(c.step, c.attempt) for c in candidates(run)] == [(5, 3), (4, 1)]


def test_an_attempt_that_never_restored_limits_nobody(run: RunFolder) -> None:
    run.claim({})
    commit(run, 4, 1)
    run.claim({})
    assert [c.step for c in candidates(run)] == [4]


def test_a_damaged_record_of_the_lineage_is_said_so(run: RunFolder) -> None:
    run.claim({})
    run.storage.write(run.attempt(1, "restored.json"), b"{")
    with pytest.raises(CheckpointError, match=r"restored\.json is damaged"):
        list(candidates(run))


# ---------------------------------------------------------------------------------------------------- retention

RECORDS = st.dictionaries(
    st.integers(1, 60), st.none() | st.just(float("nan")) | st.integers(-5, 5).map(float), min_size=1, max_size=20
)


@given(
    records=RECORDS,
    last=st.integers(1, 4),
    best=st.integers(0, 3),
    every=st.none() | st.integers(1, 12),
    maximise=st.booleans(),
    shuffle=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_retention_keeps_the_union_of_its_three_rules(
    records: dict[int, float | None], last: int, best: int, every: int | None, maximise: bool, shuffle: int
) -> None:
    manifests = [manifest(step, 1, metric) for step, metric in records.items()]
    random.Random(shuffle).shuffle(manifests)
    kept = to_keep(manifests, keep_last=last, keep_best=best, keep_every=every, maximise=maximise)
    steps = {step for step, _ in kept}
    newest_steps = set(sorted(records)[-last:])
    multiples = {step for step in records if every and step % every == 0}
    measured = {step: metric for step, metric in records.items() if metric is not None and metric == metric}
    assert max(records) in steps
    assert newest_steps | multiples <= steps
    sign = -1 if maximise else 1
    values = sorted(sign * metric for metric in measured.values())[:best]
    assert sorted(sign * metric for step, metric in measured.items() if step in steps)[: len(values)] == values
    assert len(steps - newest_steps - multiples) <= best
    assert steps - newest_steps - multiples <= set(measured)


def test_a_metric_that_is_nan_is_never_the_best() -> None:
    manifests = [manifest(1, metric=float("nan")), manifest(2, metric=3.0), manifest(3)]
    for maximise in (False, True):
        kept = to_keep(manifests, keep_last=1, keep_best=1, keep_every=None, maximise=maximise)
        assert kept == {(2, 1), (3, 1)}


# ---------------------------------------------------------------------------------------------- damaged manifests


def test_a_manifest_reads_back() -> None:
    for metric in (None, 0.5, float("inf")):
        assert Manifest.from_json(manifest(metric=metric).to_json()) == manifest(metric=metric)


def altered(**fields: Any) -> bytes:
    tree = {**json.loads(manifest().to_json()), **fields}
    return json.dumps({key: value for key, value in tree.items() if value is not ...}).encode()


DAMAGED = [
    b"", b"{", b"null", b"[]", b"{}", b'"text"', b"\xff\xfe", manifest().to_json()[:-20], b"[" * 100_000,
    altered(format="2"), altered(format=...), altered(format=True),
    altered(files=...), altered(files=[]), altered(files={TENSORS: 3}), altered(step=...),
    altered(files={TENSORS: {"bytes": 1}}), altered(files={TENSORS: {"bytes": 1, "blake3": "", "more": 1}}),
    altered(unknown=1), altered(step=5), altered(attempt=2), altered(files={}), altered(files={"../x": {}}),
    altered(files={TENSORS: {"bytes": 1, "blake3": ""}, "../../secret": {"bytes": 1, "blake3": ""}}),
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_manifest_is_a_candidate_that_says_so_and_the_older_one_is_newest(
    run: RunFolder, data: bytes
) -> None:
    older = commit(run, 3, 1)
    run.storage.write(f"{older}/{TENSORS}", b"")
    good = dataclasses.replace(manifest(3), files={TENSORS: FileRecord(0, EMPTY)})
    run.storage.write(f"{older}/{MANIFEST}", good.to_json())
    commit(run, 4, 1, data)
    found = list(candidates(run))
    assert [c.step for c in found] == [4, 3]
    assert isinstance(found[0], Damaged)
    assert f"{MANIFEST} is damaged" in found[0].why
    assert newest_step(run) == 3


@pytest.mark.parametrize(("version", "step"), [(1, "start a new run"), (4, "install a newer one")])
def test_a_manifest_of_another_version_is_not_walked_past_nor_set_aside(
    run: RunFolder, version: int, step: str
) -> None:
    checkpoints, _ = saved(run)
    path = commit(run, 9, 1, altered(format=version, step=9))
    said = rf"step-00000009.*has format {version}, this everstep reads format 3; .* or {step}"
    for work in (checkpoints.restore, lambda: locate(run.url), lambda: locate(f"{run.url}/{path}")):
        with pytest.raises(CheckpointError, match=said) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert was_set_aside(run) == []
    assert (run.storage.path(path) / MANIFEST).exists()  # type: ignore[operator]


EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
"""What `b3sum` prints for no bytes."""


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (FileRecord(2, EMPTY), "file has 0 bytes, not 2"),
        (FileRecord(0, "0" * 64), "file does not match its BLAKE3"),
        (FileRecord(0, EMPTY), ""),
    ],
)
def test_files_are_held_to_size_and_digest(run: RunFolder, record: FileRecord, said: str) -> None:
    run.storage.write("c/file", b"")
    assert find_fault(run.storage, "c", [("file", record)]) == said
    assert find_fault(run.storage, "c", [("nosuch", record)]) == "nosuch is missing"


def test_what_is_set_aside_is_no_checkpoint_any_more_but_still_there(run: RunFolder) -> None:
    path = commit(run, 4, 1)
    set_aside(run, path)
    assert list(candidates(run)) == []
    assert was_set_aside(run) == [path]
    with pytest.raises(CheckpointError, match="has no checkpoint that can be read"):
        locate(run.url)


# ------------------------------------------------------------------------------------------- a real one, and hostile


def test_a_checkpoint_restores_to_the_bit(run: RunFolder) -> None:
    checkpoints, path = saved(run)
    before = {name: tensor.clone() for name, tensor in checkpoints.state.tensors().items()}
    with torch.no_grad():
        for tensor in checkpoints.state.tensors().values():
            tensor.fill_(7)
    restored = checkpoints.restore()
    assert restored is not None
    assert restored.step == 4
    assert before.keys() == checkpoints.state.tensors().keys()
    for name, tensor in checkpoints.state.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert list(differences((run, path), (run, path))) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.pkl", "rank-0001.tensors"])
def test_a_planted_pickle_is_never_opened(run: RunFolder, tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "boom"),)

    checkpoints, path = saved(run)
    run.storage.write(f"{path}/{name}", pickle.dumps(Bomb()))
    assert checkpoints.restore() is not None
    load_weights(run.url, checkpoints.state.model, checkpoints.mesh)
    assert list(differences((run, path), (run, path))) == []
    assert not (tmp_path / "boom").exists()


WEIGHT = "model.weight"


def chunk(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree[WEIGHT]["chunks"][0]
    return found


HOSTILE = {
    "a path above": lambda t: chunk(t).update(file="../../secret"),
    "an absolute path": lambda t: chunk(t).update(file="/etc/passwd"),
    "a file that is a number": lambda t: chunk(t).update(file=3),
    "an unknown type": lambda t: t[WEIGHT].update(dtype="float33"),
    "a function for a type": lambda t: t[WEIGHT].update(dtype="load"),
    "a lazy module for a type": lambda t: t[WEIGHT].update(dtype="_dynamo"),
    "a type that is a list": lambda t: t[WEIGHT].update(dtype=[]),
    "a larger shape": lambda t: t[WEIGHT].update(shape=[2, 4]),
    "a huge shape": lambda t: t[WEIGHT].update(shape=[2**40, 2**20]),
    "a shape beyond 64 bits": lambda t: t[WEIGHT].update(shape=[2**70]),
    "a shape with a negative side": lambda t: t[WEIGHT].update(shape=[-2, -3]),
    "a shape of fractions": lambda t: t[WEIGHT].update(shape=[2.5]),
    "another type": lambda t: t[WEIGHT].update(dtype="float64"),
    "another rank": lambda t: t[WEIGHT].update(shape=[6]),
    "a piece outside": lambda t: chunk(t).update(offsets=[1, 0]),
    "a negative offset": lambda t: chunk(t).update(offsets=[-1, 0]),
    "a piece too small": lambda t: chunk(t).update(sizes=[1, 3], length=12),
    "bytes too few": lambda t: chunk(t).update(length=1),
    "a negative start": lambda t: chunk(t).update(start=-4),
    "a start that is text": lambda t: chunk(t).update(start="0"),
    "no pieces": lambda t: t[WEIGHT].update(chunks=[]),
    "no keys": lambda t: t[WEIGHT].clear(),
    "not a table": lambda t: t.update({WEIGHT: 3}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_places_of_tensors_are_refused(run: RunFolder, what: str) -> None:
    checkpoints, path = saved(run)
    tree = json.loads(run.storage.read(f"{path}/{TENSORS}"))
    HOSTILE[what](tree)
    run.storage.write(f"{path}/{TENSORS}", json.dumps(tree).encode())
    reseal(run, path)
    for work in (checkpoints.restore, lambda: read_metadata(run.storage, path), checkpoints.reload):
        with pytest.raises(CheckpointError, match=rf"{TENSORS} is damaged"):
            work()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\udcff"])
def test_what_is_no_table_of_tensors_is_refused(run: RunFolder, text: str) -> None:
    run.storage.write(f"c/{TENSORS}", text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"{TENSORS} is damaged"):
        parse_metadata(run.storage, "c", run.storage.read(f"c/{TENSORS}"), {})


def test_a_table_of_tensors_that_is_gone_is_said_so(run: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=rf"{TENSORS} is missing"):
        read_metadata(run.storage, "c")


def test_a_file_that_ends_too_early_is_refused_though_its_digest_fits(run: RunFolder) -> None:
    checkpoints, path = saved(run)
    file = next(name for name in run.storage.names(path) if name.endswith(".tensors"))
    run.storage.write(f"{path}/{file}", run.storage.read(f"{path}/{file}")[:-2])
    reseal(run, path)
    for read in (checkpoints.restore, lambda: read_metadata(run.storage, path)):
        with pytest.raises(CheckpointError, match=rf"{TENSORS} is damaged: length of '.*' is \d+, not"):
            read()


@pytest.mark.parametrize(
    "fields",
    [
        {"progress": {"stepp": 1}},
        {"progress": []},
        {"values": 3},
        {"step": "4"},
        {"values": {"model": [3]}},
        {"values": {"model": {"x": 3}}},
        {"values": {"optimizer": 3}},
        {"values": {"optimizer": {"groups": [3, 4, 5]}}},
        {"values": {"model": {"weight": {"$": "tensor", "tensor": "nowhere"}}}},
        {"values": {"attributes": [1]}},
        {"values": {"attributes": {"model.forward": 1}}},
        {"values": {"attributes": {"optimizer.param_groups": []}}},
        {"values": {"attributes": {"elsewhere.x": 1}}},
        {"values": {"model": {"weight": {"$": "open", "of": "x"}}}},
    ],
)
def test_hostile_numbers_are_refused(run: RunFolder, fields: dict[str, Any]) -> None:
    checkpoints, path = saved(run)
    tree = json.loads(run.storage.read(f"{path}/{MANIFEST}"))
    run.storage.write(f"{path}/{MANIFEST}", json.dumps({**tree, **fields}).encode())
    with pytest.raises(CheckpointError):
        checkpoints.restore()


def test_a_checkpoint_of_another_dataset_or_model_is_said_so(run: RunFolder) -> None:
    checkpoints, _ = saved(run)
    checkpoints._restorer.facts = dataclasses.replace(checkpoints._restorer.facts, data_digest="another")
    with pytest.raises(DataError, match="was trained on another dataset"):
        checkpoints.restore()
    for shape, said in (((5, 2), r"model\.weight is \[2, 3\] there, \[2, 5\] in the model"), ((3, 2), "")):
        weights = torch.nn.Linear(*shape)
        if said:
            with pytest.raises(CheckpointError, match=said):
                load_weights(run.url, weights, checkpoints.mesh)
        else:
            assert run.checkpoint(4, 1) in load_weights(run.url, weights, checkpoints.mesh)


def test_a_url_may_name_one_checkpoint(run: RunFolder) -> None:
    _, path = saved(run)
    assert locate(f"{run.url}/{path}")[1] == path
    assert locate(run.url)[1] == path
    with pytest.raises(CheckpointError, match="is not a checkpoint: it has no manifest"):
        locate(f"{run.url}/{run.checkpoint(5, 1)}")
