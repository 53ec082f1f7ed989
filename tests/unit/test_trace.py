"""Which step used which sample, from the run folder alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from everstep.config import ExcludeConfig, OrderConfig, RunConfig
from everstep.dataset.index import ShardIndex
from everstep.errors import ConfigError, DataError
from everstep.frozen_config import freeze
from everstep.run_folder import CONFIG, MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import TENSORS, FileRecord, Manifest
from everstep.trainer.command import verb
from everstep.trainer.data.ordering.data_record import DataRecord, order_sources, read_record, write_record
from everstep.trainer.data.ordering.order import SampleOrder
from everstep.trainer.data.ordering.sample_names import sample_ids
from everstep.trainer.data.ordering.trace import Trace
from everstep.trainer.state.train_state import Progress
from support.shard_datasets import write_dataset

SOURCES = [
    DataRecord("s3://lake/web", "a", "7/10", [30, 5, 25], ["web-0.arrow", "web-1.arrow", "web-2.arrow"]),
    DataRecord("code", "b", "3/10", [10, 7], ["code-0.arrow", "code-1.arrow"]),
]


ORDER = OrderConfig(window=2, lanes=2)


def config(seed: int = 0) -> RunConfig:
    excluded = [ExcludeConfig(from_step=20, samples=[3])]
    return RunConfig(run="mine", steps=50, global_batch=12, micro_batch=3, seed=seed, order=ORDER, exclude=excluded)


def write_manifest(run: RunFolder, step: int, attempt: int) -> None:
    progress = {**asdict(Progress(step=step)), "micro_batch": 3}
    manifest = Manifest(
        step=step, attempt=attempt, samples=step * 12, world=1, parallel="single", time=0.0, config_digest="",
        data_digest="", progress=progress, values={}, metric=None, files={TENSORS: FileRecord(0, "0" * 64)},
    )  # fmt: skip
    run.storage.write(f"{run.checkpoint(step, attempt)}/{MANIFEST}", manifest.to_json())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "mine"))
    folder.storage.write(CONFIG, freeze(config()).encode())
    write_record(folder, SOURCES)
    return folder


def test_steps_and_samples_are_each_others_inverse(run: RunFolder) -> None:
    trace = Trace(run)
    steps = [trace.step(number) for number in range(1, 51)]
    order = SampleOrder.of_config(OrderConfig(window=2, lanes=2), order_sources(SOURCES), 12, 3, seed=0)
    assert [[visit.sample for visit in step] for step in steps] == order.ids(0, 600).reshape(50, 12).tolist()
    for sample in range(order.samples):
        expected = [visit for step in steps for visit in step if visit.sample == sample]
        assert list(trace.visits(sample)) == expected


def test_a_visit_says_dataset_shard_row_microbatch_and_what_became_of_it(run: RunFolder) -> None:
    trace = Trace(run)
    visit = next(trace.visits(trace.places.sample("code-1.arrow", 4)))
    assert (visit.sample, visit.source, visit.shard, visit.row) == (74, "code", "code-1.arrow", 4)
    assert visit.microbatch == visit.place // 3
    assert trace.places.sample("s3://lake/web/web-1.arrow", 0) == 30
    states = {visit.step >= 20: visit.state for visit in trace.visits(3)}
    assert states == {False: "to come", True: "excluded"}


def test_a_step_is_traced_by_the_attempt_that_made_it_though_a_resume_has_changed_the_order(run: RunFolder) -> None:
    """Attempt 2 went on from step 20 with another seed, and 3 from step 10, which left the work of 2."""
    seeds = {1: 0, 2: 7, 3: 9}
    for attempt, start in ((1, 0), (2, 20), (3, 10)):
        run.record_restored(attempt, start, 0)
        run.storage.create(run.attempt(attempt, CONFIG), freeze(config(seeds[attempt])).encode())
    write_manifest(run, step=30, attempt=3)
    trace = Trace(run)
    for step, seed in ((1, 0), (10, 0), (11, 9), (30, 9), (31, 0)):
        order = SampleOrder.of_config(ORDER, order_sources(SOURCES), 12, 3, seed)
        assert [visit.sample for visit in trace.step(step)] == order.ids(12 * (step - 1), 12).tolist()
    steps = [visit for number in range(1, 51) for visit in trace.step(number)]
    assert all(list(trace.visits(sample)) == [v for v in steps if v.sample == sample] for sample in range(77))
    assert trace.step(11, microbatch=2) == [visit for visit in trace.step(11) if visit.place in (6, 7, 8)]


def test_samples_are_found_by_the_value_of_a_column_in_the_data_of_the_run(tmp_path: Path) -> None:
    write_dataset(tmp_path / "web", [3, 2], {"id": np.arange(5), "user": ["a", "bob", "a", "c", "bob"]})
    write_dataset(tmp_path / "code", [2], {"user": ["bob", "bo"]})
    places = [str(tmp_path / name) for name in ("web", "code")]
    found = [ShardIndex.read(place) for place in places]
    folder = RunFolder(str(tmp_path / "mine"))
    folder.storage.write(CONFIG, freeze(config()).encode())
    write_record(
        folder,
        [
            DataRecord(place, index.digest, "1/2", [s.rows for s in index.shards], [s.file for s in index.shards])
            for place, index in zip(places, found, strict=True)
        ],
    )
    trace = Trace(folder)
    assert sample_ids(trace, "user=bob") == [1, 4, 5]
    assert sample_ids(trace, "id=3") == [3]
    with pytest.raises(ConfigError, match=r"--sample 'user=x': no sample of the run has this value"):
        sample_ids(trace, "user=x")
    with pytest.raises(DataError, match="no dataset of the run has a column 'age'"):
        sample_ids(trace, "age=3")
    write_dataset(tmp_path / "code", [2], {"user": ["bob", "bob"]})
    with pytest.raises(DataError, match="is no longer the data of the run"):
        sample_ids(trace, "user=bob")


def test_the_command_prints_a_table_or_lines_of_json(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["data", "trace", run.url, "--step", "7"]) == 0
    assert "web-0.arrow" in capsys.readouterr().out
    assert verb(["data", "trace", run.url, "--sample", "74", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["row"] for line in lines} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "51"], "the run has steps 1 to 50"),
        (["--step", "0"], "the run has steps 1 to 50"),
        (["--sample", "77"], "the run has samples 0 to 76"),
        (["--sample", "web-9.arrow:1"], "0 shards of the run are called 'web-9.arrow'"),
        (["--sample", "web-1.arrow:5"], "web-1.arrow has rows 0 to 4, not 5"),
        (["--sample", "x"], "neither an id nor FILE:ROW"),
        (["--sample", "3", "--microbatch", "1"], "--microbatch 1: give the --step too"),
        (["--step", "3", "--microbatch", "4"], "--microbatch 4: step 3 has microbatches 0 to 3"),
    ],
)
def test_what_the_run_does_not_have_is_one_line(
    run: RunFolder, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert verb(["data", "trace", run.url, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_record_is_written_once_and_a_damaged_one_is_named(run: RunFolder) -> None:
    write_record(run, SOURCES)
    assert read_record(run) == SOURCES
    run.storage.write("data.json", b"{")
    with pytest.raises(DataError, match=r"data\.json is damaged"):
        read_record(run)
    run.storage.delete("data.json")
    with pytest.raises(DataError, match="its run never began to train"):
        read_record(run)
