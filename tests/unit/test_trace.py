"""Which step used which sample, from the run folder alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everstep.config import ExcludeConfig, OrderConfig, RunConfig
from everstep.errors import DataError
from everstep.frozen_config import freeze
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.command import verb
from everstep.trainer.data.ordering.order import SampleOrder
from everstep.trainer.data.ordering.trace import DataRecord, Trace, order_sources, read_record, write_record

SOURCES = [
    DataRecord("s3://lake/web", "a", "7/10", [30, 5, 25], ["web-0.arrow", "web-1.arrow", "web-2.arrow"]),
    DataRecord("code", "b", "3/10", [10, 7], ["code-0.arrow", "code-1.arrow"]),
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = RunConfig(
        run="mine",
        steps=50,
        global_batch=12,
        micro_batch=3,
        order=OrderConfig(window=2, lanes=2),
        exclude=[ExcludeConfig(from_step=20, samples=[3])],
    )
    folder = RunFolder(str(tmp_path / "mine"))
    folder.storage.write(CONFIG, freeze(config).encode())
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
    visit = next(trace.visits(trace.sample("code-1.arrow:4")))
    assert (visit.sample, visit.source, visit.shard, visit.row) == (74, "code", "code-1.arrow", 4)
    assert visit.microbatch == visit.place // 3
    assert trace.sample("s3://lake/web/web-1.arrow:0") == 30
    states = {visit.step >= 20: visit.state for visit in trace.visits(3)}
    assert states == {False: "to come", True: "excluded"}


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
