"""Models as people bring them: a resume on the same world gives the same bits, on another one the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.resume_checks import IDS, PLACES, assert_resumes, changed, cut_off, state, training_records, values, zoo

pytestmark = pytest.mark.dist

EVERYWHERE = (
    "BatchNorm", "Codebook", "Queue", "Tied", "TwoNames", "TiedAcrossBlocks", "Recurrent", "WeightNorm", "SpectralNorm",
    "ExtraTensor", "ExtraDict", "ExtraBytes", "Hooked", "Complex", "MixedTypes", "FrozenBackbone", "Adapter",
    "Expanded", "ExpandedHooked", "Views", "Replaced", "ChannelsLast", "Scalar", "Counter", "NotPersistent", "Dropped",
    "OwnGenerator", "Switched", "Running", "TorchsSyncBatchNorm",
)  # fmt: skip
ANY_WORLD = (
    "Tied", "TwoNames", "TiedAcrossBlocks", "Recurrent", "WeightNorm", "Complex", "FrozenBackbone", "Adapter",
    "Expanded", "ChannelsLast", "Scalar", "Dropped", "BatchNorm", "Codebook", "Queue", "SpectralNorm", "Replaced",
    "Running", "Counter", "NotPersistent", "ExpandedHooked", "Views", "OwnGenerator", "Switched",
)  # fmt: skip


@pytest.mark.parametrize("model", EVERYWHERE)
@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_a_resume_gives_the_same_bits(tmp_path: Path, world: int, kind: str, model: str) -> None:
    assert_resumes(world, tmp_path, kind, f"model._target_=zoo.models.{model}")


@pytest.mark.parametrize("model", ANY_WORLD)
def test_another_world_gives_the_same_model(tmp_path: Path, model: str) -> None:
    given = (f"model._target_=zoo.models.{model}", "precision=fp64")
    assert zoo(1, tmp_path, "single", *given).codes == [0]
    cut_off(tmp_path)
    again = zoo(2, tmp_path, "fsdp", *given, side="resumed")
    assert again.codes == [0, 0], again.printed
    one, other = state(tmp_path, "straight"), state(tmp_path, "resumed")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp")])
@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torch.optim.SparseAdam", "torch.optim.Adagrad"])
def test_sparse_gradients_train_and_resume(tmp_path: Path, world: int, kind: str, optimizer: str) -> None:
    only = "SparseEmbedding" if optimizer != "torch.optim.SparseAdam" else "SparseOnly"
    assert_resumes(
        world, tmp_path, kind, f"model._target_=zoo.models.{only}", "optimizer=bare", f"optimizer._target_={optimizer}"
    )


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp")])
def test_a_branch_that_some_batches_take_resumes_with_find_unused(tmp_path: Path, world: int, kind: str) -> None:
    assert_resumes(world, tmp_path, kind, "model._target_=zoo.models.Conditional", "parallel.find_unused=true")


@pytest.mark.parametrize("model", ["Conditional", "Unused"])
def test_a_parameter_without_gradient_under_ddp_names_the_key(tmp_path: Path, model: str) -> None:
    ended = zoo(2, tmp_path, "ddp", f"model._target_=zoo.models.{model}", "group_timeout_s=60")
    assert 2 in ended.codes, ended.printed
    assert "parallel.find_unused=false" in ended.printed


def test_held_out_data_does_not_change_what_is_trained(tmp_path: Path) -> None:
    for side, held_out in (("straight", 8), ("resumed", 0)):
        given = ("model._target_=zoo.models.FrozenBackbone", f"+data.held_out={held_out}", "evaluate.every=1")
        assert zoo(1, tmp_path, "single", *given, side=side).codes == [0]
    assert changed(tmp_path) == []


@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
@pytest.mark.parametrize("weights", [
    ("ema=0.5", "evaluate.weights=ema"), ("optimizer=bare", "optimizer._target_=zoo.optimizers.ScheduleFree"),
], ids=["ema", "schedule-free"])  # fmt: skip
def test_evaluating_other_weights_does_not_change_what_is_trained(
    tmp_path: Path, world: int, kind: str, weights: tuple[str, ...]
) -> None:
    for side, every in (("straight", "1"), ("resumed", "null")):
        assert zoo(world, tmp_path, kind, *weights, f"evaluate.every={every}", side=side).codes == [0] * world
    assert changed(tmp_path) == []


@pytest.mark.parametrize("policy", ["auto", "first", "mean"])
def test_buffers_are_equal_on_all_ranks_by_either_policy(tmp_path: Path, policy: str) -> None:
    assert_resumes(2, tmp_path, "ddp", "model._target_=zoo.models.BatchNorm", f"parallel.buffers={policy}")


@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_a_loss_that_gathers_from_the_other_processes_resumes(tmp_path: Path, world: int, kind: str) -> None:
    assert_resumes(world, tmp_path, kind, "task._target_=zoo.models.Gathering", "evaluate.every=null")


@pytest.mark.parametrize(
    ("worlds", "given"),
    [
        ((2, 3), ("task._target_=zoo.models.Gathering", "evaluate.every=null")),
        ((2, 1), ("task._target_=zoo.models.Gathering", "evaluate.every=null")),
        ((1, 2), ("task._target_=zoo.models.Gathering", "evaluate.every=null")),
        ((2, 3), ("model._target_=zoo.models.BatchNorm", "parallel.sync_batchnorm=true", "micro_batch=2")),
    ],
    ids=["gather-2-3", "gather-2-1", "gather-1-2", "batchnorm"],
)
def test_a_loss_that_depends_on_the_number_of_processes_is_refused_on_another(
    tmp_path: Path, worlds: tuple[int, int], given: tuple[str, ...]
) -> None:
    kinds = ["single" if world == 1 else "ddp" for world in worlds]
    assert zoo(worlds[0], tmp_path, kinds[0], *given).codes == [0] * worlds[0]
    cut_off(tmp_path)
    refused = zoo(worlds[1], tmp_path, kinds[1], *given, side="resumed")
    assert 2 in refused.codes, refused.printed
    assert f"the loss depends on their number, which was {worlds[0]}" in refused.printed
    assert ("in loss sees" in refused.printed) == ("Gathering" in given[0])
    allowed = zoo(worlds[1], tmp_path, kinds[1], *given, "resume.allow=[world]", side="resumed")
    assert allowed.codes == [0] * worlds[1], allowed.printed


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_model_with_collectives_of_torch_alone_resumes_on_another_number(tmp_path: Path, kind: str) -> None:
    given = ("model._target_=zoo.models.BatchNorm", "parallel.sync_batchnorm=true", "micro_batch=4")
    assert zoo(2, tmp_path, kind, *given).codes == [0, 0]
    cut_off(tmp_path)
    again = zoo(3, tmp_path, kind, *given, side="resumed")
    assert again.codes == [0, 0, 0], again.printed


def test_sync_batchnorm_works_on_the_cpu_and_resumes(tmp_path: Path) -> None:
    given = ("model._target_=zoo.models.BatchNorm", "parallel.sync_batchnorm=true")
    assert_resumes(2, tmp_path, "ddp", *given)


def test_sync_batchnorm_on_two_processes_is_batchnorm_of_the_whole_batch(tmp_path: Path) -> None:
    given = ("model._target_=zoo.models.BatchNorm", "parallel.sync_batchnorm=true", "precision=fp64", "steps=3")
    assert zoo(1, tmp_path, "single", *given, "micro_batch=8").codes == [0]
    assert zoo(2, tmp_path, "ddp", *given, "micro_batch=4", side="resumed").codes == [0, 0]
    one, other = state(tmp_path, "straight"), state(tmp_path, "resumed")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_a_sync_batchnorm_of_torch_is_that_of_everstep_on_the_cpu(tmp_path: Path) -> None:
    given = ("model._target_=zoo.models.BatchNorm", "parallel.sync_batchnorm=true")
    assert zoo(2, tmp_path, "ddp", *given).codes == [0, 0]
    assert zoo(2, tmp_path, "ddp", "model._target_=zoo.models.TorchsSyncBatchNorm", side="resumed").codes == [0, 0]
    assert changed(tmp_path) == []


def test_metrics_of_the_training_loss_are_recorded_as_means_over_the_whole_batch(tmp_path: Path) -> None:
    given = ("task._target_=zoo.models.Measuring", "precision=fp64")
    assert zoo(1, tmp_path, "single", *given).codes == [0]
    assert zoo(2, tmp_path, "ddp", *given, side="resumed").codes == [0, 0]
    one, other = (training_records(tmp_path, side) for side in ("straight", "resumed"))
    assert len(one) == 6
    for record, same in zip(one, other, strict=True):
        assert record["twice"] == pytest.approx(2 * record["loss"])
        assert same["twice"] == pytest.approx(record["twice"], rel=1e-9)
        assert [record["ones"], same["ones"]] == [1.0, 1.0]


@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_a_metric_that_only_some_microbatches_have_is_a_mean_over_their_items(
    tmp_path: Path, world: int, kind: str
) -> None:
    assert_resumes(world, tmp_path, kind, "task._target_=zoo.models.Measuring", "steps=6")
    found = [record["above"] for record in training_records(tmp_path, "straight") if "above" in record]
    assert set(found) == {1.0}


@pytest.mark.parametrize(("given", "said"), [
    ("task._target_=zoo.models.TakenName", "a metric 'lr': a record has that already; rename it"),
    ("model._target_=zoo.models.SparseEmbedding", "table.weight have sparse gradients: use sparse=False"),
    ("data._target_=zoo.data.doubles", "are float64 and the model's weights are not: set data.cast={x: float32}"),
])  # fmt: skip
@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp")])
def test_a_first_step_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, world: int, kind: str, given: str, said: str
) -> None:
    ended = zoo(world, tmp_path, kind, given, "evaluate.every=null")
    assert ended.codes == [2] * world, ended.printed
    assert said in ended.printed
    assert "Traceback" not in ended.printed


def test_a_task_that_goes_around_ddp_is_refused_after_its_first_step(tmp_path: Path) -> None:
    ended = zoo(2, tmp_path, "ddp", "task._target_=zoo.models.AroundDdp")
    assert ended.codes == [2, 2], ended.printed
    assert "their gradients were not reduced" in ended.printed


@pytest.mark.parametrize("task", ["MadeBefore", "LooksAtWeights", "HandsOut", "Remembering", "Annealing"])
@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_the_state_of_a_task_is_saved(tmp_path: Path, world: int, kind: str, task: str) -> None:
    given = f"task._target_=zoo.models.{task}"
    if (kind, task) == ("fsdp", "MadeBefore"):
        assert "gives the same modules at each call" in zoo(2, tmp_path, kind, given).printed
    else:
        assert_resumes(world, tmp_path, kind, given)


def test_a_counter_in_an_attribute_is_in_the_checkpoint(tmp_path: Path) -> None:
    assert zoo(1, tmp_path, "single", "model._target_=zoo.models.Counter").codes == [0]
    found = values(tmp_path, "straight")["attributes"]
    assert found["model.temperature"] == pytest.approx(0.9**6)  # six steps, whatever the number of passes
    assert found["model.started"] is True


@pytest.mark.parametrize(("given", "said"), [
    ("model._target_=zoo.models.Unsavable", "_extra_state.lock is a builtins.object"),
    ("model._target_=zoo.models.Forgetful", "self-test: model._extra_state.n does not come back"),
    ("task._target_=zoo.models.Halved", "has state_dict() and no load_state_dict()"),
])  # fmt: skip
def test_state_that_does_not_come_back_is_refused_before_the_first_step(tmp_path: Path, given: str, said: str) -> None:
    ended = zoo(1, tmp_path, "single", given)
    assert ended.codes == [2], ended.printed
    assert said in ended.printed
    assert not (tmp_path / "straight/zoo/ledger.jsonl").exists()


def test_a_buffer_of_another_size_on_each_rank_is_refused_on_all_ranks(tmp_path: Path) -> None:
    ended = zoo(2, tmp_path, "ddp", "model._target_=zoo.models.Growing")
    assert ended.codes == [2, 2], ended.printed
    assert "the model's buffer largest is not of one shape and type on all ranks" in ended.printed


def test_sync_batchnorm_refuses_a_norm_that_does_more(tmp_path: Path) -> None:
    ended = zoo(1, tmp_path, "single", "model._target_=zoo.models.ActivatedNorm", "parallel.sync_batchnorm=true")
    assert ended.codes == [2], ended.printed
    assert "Activated at 'net.1', whose own forward() would be lost" in ended.printed


def test_hooks_that_move_or_go_keep_their_own_state(tmp_path: Path) -> None:
    one, other, third = (
        "{_target_: zoo.models.Counts}", "{_target_: zoo.models.CountsTwice}", "{_target_: zoo.models.Counts, by: 3}"
    )  # fmt: skip
    assert zoo(1, tmp_path, "single", f"hooks=[{one},{other},{third}]").codes == [0]
    cut_off(tmp_path)
    again = zoo(1, tmp_path, "single", f"hooks=[{other}]", side="resumed")
    assert again.codes == [0], again.printed
    found = {name: value for name, value in values(tmp_path, "resumed")["attributes"].items() if "hooks" in name}
    assert found == {"hooks.zoo.models.CountsTwice.count": 12}
    assert values(tmp_path, "straight")["attributes"]["hooks.zoo.models.Counts:2.count"] == 18


def test_tags_on_parameters_are_there_under_fsdp(tmp_path: Path) -> None:
    given = ("model._target_=zoo.models.Tagged", "optimizer=bare", "optimizer._target_=zoo.optimizers.ByTag",
             "precision=fp64")  # fmt: skip
    assert zoo(1, tmp_path, "single", *given).codes == [0]
    assert zoo(2, tmp_path, "fsdp", *given, side="resumed").codes == [0, 0]
    one, other = state(tmp_path, "straight"), state(tmp_path, "resumed")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-9, msg=name)
