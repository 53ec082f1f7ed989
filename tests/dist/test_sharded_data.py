"""Runs over prepared shards: mixed, in lanes, from a store through a small cache, with samples left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from everstep.trainer.checkpoint.manifest import Committed, candidates, was_set_aside
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.command import verb
from everstep.trainer.data.ordering.data_record import read_record
from everstep.trainer.data.ordering.sample_names import sample_ids
from everstep.trainer.data.ordering.trace import Trace
from everstep.trainer.reporting.sinks import read_metrics
from support import kill_points
from support.ranks import environment, folder, ledger, train
from support.shard_datasets import write_dataset
from support.toy import WIDTH

pytestmark = pytest.mark.dist
LANES = ("global_batch=12", "order.lanes=3", "order.window=2")


def write_toy(path: str | Path, rows: Sequence[int], seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(sum(rows), WIDTH)).astype(np.float32)
    write_dataset(path, rows, {"x": x, "y": np.sin(x.sum(axis=1)).astype(np.float32)})


def mixed(first: str | Path, second: str | Path) -> list[str]:
    return [
        "data._target_=everstep.data.mixture",
        f"data.mix=[{{path: '{first}', weight: 0.7}}, {{path: '{second}', weight: 0.3}}]",
        "evaluate.every=null",
        *LANES,
    ]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run over two datasets of uneven shards, of which one repeats more often than the other."""
    root = tmp_path_factory.mktemp("sets")
    write_toy(root / "large", [20, 3, 11, 30, 0, 9, 17], seed=1)
    write_toy(root / "small", [5, 4, 8], seed=2)
    return mixed(root / "large", root / "small")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sets: list[str]) -> Path:
    root = tmp_path_factory.mktemp("alone")
    ended = train(1, root, *sets)
    assert ended.codes == [0], ended.printed
    return root


def test_a_mixture_in_lanes_is_the_same_on_every_world_and_after_a_kill(
    alone: Path, tmp_path: Path, sets: list[str]
) -> None:
    killed = train(3, tmp_path, *sets, before=lambda rank: kill_points.in_step(6) if rank == 1 else None)
    assert killed.codes[1] == -9, killed.printed
    for steps, world, loader in ((8, 2, "loader.prefetch=3"), (12, 4, "loader.workers=2")):
        ended = train(world, tmp_path, *sets, f"steps={steps}", loader)
        assert ended.codes == [0] * world, ended.printed
    assert ledger(tmp_path) == ledger(alone)
    expected = [record["loss"] for record in read_metrics(folder(alone)).values()]
    assert [record["loss"] for record in read_metrics(folder(tmp_path)).values()] == pytest.approx(expected, rel=1e-9)


def test_the_trace_of_a_run_is_what_its_steps_used_and_the_inverse_agrees(alone: Path) -> None:
    trace = Trace(folder(alone))
    used = ledger(alone)
    for step, samples in used.items():
        assert [visit.sample for visit in trace.step(step)] == samples
    for sample in (0, 57, 89, 90, 106):
        steps = [step for step, samples in used.items() for one in samples if one == sample]
        assert [visit.step for visit in trace.visits(sample)] == steps
    visit = trace.step(3)[5]
    assert sample_ids(trace, f"{visit.source}/{visit.shard}:{visit.row}") == [visit.sample]
    assert visit.state == "trained"


def test_samples_excluded_on_the_way_are_used_no_more_and_the_rest_stays(
    alone: Path, tmp_path: Path, sets: list[str]
) -> None:
    used = ledger(alone)
    gone = [*used[3][:3], *used[7][:4], *used[11][2:5]]
    assert train(2, tmp_path, *sets, "steps=4").codes == [0, 0]
    late = train(1, tmp_path, *sets, f"exclude=[{{from_step: 3, samples: {gone}}}]")
    assert late.codes == [2]
    assert "set exclude.from_step to 5 or later" in late.printed
    ended = train(3, tmp_path, *sets, f"exclude=[{{from_step: 5, samples: {gone}}}]")
    assert ended.codes == [0] * 3, ended.printed
    expected = {step: [s for s in samples if step < 5 or s not in gone] for step, samples in used.items()}
    assert ledger(tmp_path) == expected
    states = {visit.state for visit in Trace(folder(tmp_path)).visits(gone[3])}
    assert "excluded" in states


def test_a_deletion_request_holds_from_its_step_on_every_world_and_for_every_later_command(
    alone: Path, tmp_path: Path, sets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The request comes after step 4; the run goes on elsewhere, by the command that began it."""
    used, run = ledger(alone), str(tmp_path / "toy")
    gone = sorted({*used[3][:3], *used[7][:4], *used[11][2:5]})
    assert train(2, tmp_path, *sets, "steps=4").codes == [0, 0]
    assert train(1, tmp_path, *sets, "steps=4").codes == [0]
    names = ",".join(map(str, gone))
    assert verb(["data", "exclude", run, "--samples", names, "--from", "4"]) == 2
    assert "the run has reached step 4" in capsys.readouterr().err
    assert verb(["data", "exclude", run, "--samples", names, "--note", "ticket 7"]) == 0
    assert verb(["data", "exclude", run, "--samples", names]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert folder(tmp_path).record("exclusions/0001.json")["samples"] == gone
    ended = train(3, tmp_path, *sets)
    assert ended.codes == [0] * 3, ended.printed
    expected = {step: [s for s in samples if step < 5 or s not in gone] for step, samples in used.items()}
    assert ledger(tmp_path) == expected
    trace = Trace(folder(tmp_path))
    left = {step: [v.sample for v in trace.step(step) if v.state != "excluded"] for step in used}
    assert left == expected
    saved = {
        found.step: found.manifest.values for found in candidates(folder(tmp_path)) if isinstance(found, Committed)
    }
    assert {step: values.get("excluded", {}).get("samples", 0) for step, values in saved.items()} == {
        step: len(gone) if step > 4 else 0 for step in saved
    }


def test_a_checkpoint_that_holds_what_was_to_be_left_out_is_not_gone_on_from(tmp_path: Path, sets: list[str]) -> None:
    """As of a process that nobody knew of, and that went on after the request."""
    assert train(1, tmp_path, *sets, "steps=4").codes == [0]
    before = folder(tmp_path).storage.read("config.yaml")
    assert train(1, tmp_path, *sets, "steps=8").codes == [0]
    changed = before.replace(b"exclude: []", b"exclude: [{from_step: 6, samples: [1, 2], requested: true}]")
    folder(tmp_path).storage.write("config.yaml", changed.replace(b"steps: 4\n", b"steps: 12\n"))
    (tmp_path / "toy/ledger.jsonl").unlink()
    ended = train(1, tmp_path, *sets)
    assert ended.codes == [0], ended.printed
    assert min(ledger(tmp_path)) == 5
    assert [path.split("/")[1][:13] for path in was_set_aside(folder(tmp_path))] == ["step-00000008"]


def test_a_start_refuses_data_without_the_tags_of_its_policy_and_records_those_it_takes(tmp_path: Path) -> None:
    for name, seed in (("large", 1), ("small", 2)):
        write_toy(tmp_path / name, [20, 20], seed)
    sets = mixed(tmp_path / "large", tmp_path / "small")
    assert verb(["data", "tag", str(tmp_path / "large"), "license=CC0"]) == 0
    refused = train(1, tmp_path, *sets, "policy.allow_tags=[license:CC0]", "steps=1")
    assert refused.codes == [2]
    assert f"policy.allow_tags=[license:CC0]: {tmp_path}/small has no tags" in refused.printed
    assert verb(["data", "tag", str(tmp_path / "small"), "license=CC0"]) == 0
    taken = train(1, tmp_path, *sets, "policy.allow_tags=[license:CC0]", "steps=1")
    assert taken.codes == [0], taken.printed
    assert [record.tags for record in read_record(folder(tmp_path))] == [{"license": "CC0"}] * 2


def test_a_run_reads_a_store_through_a_cache_smaller_than_its_data(s3: str, tmp_path: Path) -> None:
    rows = [400] * 12
    write_toy(tmp_path / "local", rows, seed=3)
    write_toy(f"{s3}/toy-set", rows, seed=3)
    size = sum(file.stat().st_size for file in (tmp_path / "local").glob("*.arrow"))
    data = ["data._target_=everstep.data.prepared", "evaluate.every=null", "order.window=2", "steps=24"]
    small = f"loader.cache_gb={size / 3 / 1e9}"
    with environment(EVERSTEP_CACHE=str(tmp_path / "cache")):
        remote = [*data, f"data.path={s3}/toy-set", small, "global_batch=70", "micro_batch=10"]
        ended = train(2, tmp_path, *remote, "loader.prefetch=2", run="remote")
        assert ended.codes == [0, 0], ended.printed
    local = [*data, f"data.path={tmp_path / 'local'}", "global_batch=70", "micro_batch=10"]
    assert train(2, tmp_path, *local, run="other").codes == [0, 0]
    assert ledger(tmp_path, "remote") == ledger(tmp_path, "other")
    assert list(differences(locate(str(tmp_path / "remote")), locate(str(tmp_path / "other")))) == []
    left = sum(file.stat().st_blocks * 512 for file in (tmp_path / "cache").rglob("*.arrow"))
    assert 0 < left < size * 0.6


def test_a_resume_on_data_that_differ_in_one_bit_is_refused(tmp_path: Path) -> None:
    write_toy(tmp_path / "set", [20, 20], seed=1)
    data = ["data._target_=everstep.data.prepared", f"data.path={tmp_path / 'set'}", "evaluate.every=null"]
    assert train(1, tmp_path, *data, "steps=4").codes == [0]
    x = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)
    y = np.sin(x.sum(axis=1)).astype(np.float32)
    x.view(np.uint32)[13, 2] ^= 1
    write_dataset(tmp_path / "set", [20, 20], {"x": x, "y": y})
    ended = train(1, tmp_path, *data)
    assert ended.codes == [2]
    assert ended.printed.count("error:") == 1
    assert "data" in ended.printed
    assert "Traceback" not in ended.printed


def test_lanes_that_do_not_fit_the_batch_are_refused_with_the_key(tmp_path: Path) -> None:
    ended = train(1, tmp_path, "order.lanes=3")
    assert ended.codes == [2]
    assert "order.lanes" in ended.printed
    assert "must divide global_batch=7" in ended.printed


def test_the_shares_of_a_mixture_hold_at_every_step(alone: Path) -> None:
    seen = 0
    large = 0
    for samples in islice(ledger(alone).values(), 12):
        seen += len(samples)
        large += sum(sample < 90 for sample in samples)
        assert abs(large - 0.7 * seen) < 1


def test_a_cache_too_small_for_the_window_is_told_with_the_keys(s3: str, tmp_path: Path) -> None:
    write_toy(f"{s3}/wide-set", [400] * 4, seed=3)
    data = ["data._target_=everstep.data.prepared", f"data.path={s3}/wide-set", "evaluate.every=null", "steps=2"]
    ended = train(1, tmp_path, *data, "loader.cache_gb=4e-5", f"loader.cache={tmp_path / 'cache'}")
    assert ended.codes == [0], ended.printed
    events = (tmp_path / "toy" / "attempts" / "0001" / "events.jsonl").read_text()
    assert "half of the cache holds 1 shards, order.window=4 needs as many" in events
    assert "loader.cache_gb=9" in events
