"""State that no checkpoint holds is refused before the first step, if what is trained depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.resume_checks import IDS, PLACES, assert_resumes, zoo

pytestmark = pytest.mark.dist
BARE = ("optimizer=bare", "optimizer._target_=zoo.hidden.Decaying")
HIDDEN = [
    (("model._target_=zoo.hidden.InAnObject",), "because of model.meter (Meter)"),
    (("model._target_=zoo.hidden.InADictOfObjects",), "because of model.meters (dict)"),
    (("model._target_=zoo.hidden.InAClosure",), "because of a closure or a global variable"),
    (("model._target_=zoo.hidden.LastOutput",), "because of model.last (Tensor)"),
    (("model._target_=zoo.hidden.MadeByTheFirstPass",), "has no attribute 'meter', and would not without one"),
    (("model._target_=zoo.hidden.FromAGlobal",), "takes something from outside"),
    (("model._target_=zoo.hidden.FromTheClock",), "takes something from outside"),
    (("model._target_=zoo.hidden.FromAnUnseededGenerator",), "takes something from outside"),
    (("model._target_=zoo.hidden.LateBuffer",), "the checkpoint has model.mean, which the model has not"),
    (("task._target_=zoo.hidden.Weighted",), "because of task.meter (Meter)"),
    (BARE, "because of optimizer.meter (Meter)"),
    (("model._target_=zoo.hidden.MeanInAnObject",), "because of model.meter (Meter)"),
    (("model._target_=zoo.hidden.Unfreezing",), "has been unfrozen since, so nothing trains it"),
    (("task._target_=zoo.hidden.TimedAndWeighted",), "task.meter (Meter)"),
    (("task._target_=zoo.hidden.LearntWeight",), "task.scale gets a gradient and no optimizer trains it"),
]
NAMES = [next(word for word in given if "zoo.hidden" in word).rpartition(".")[2] for given, _ in HIDDEN]


@pytest.mark.parametrize(("given", "said"), HIDDEN, ids=NAMES)
@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_it_is_refused_on_all_ranks_before_the_first_step(
    tmp_path: Path, world: int, kind: str, given: tuple[str, ...], said: str
) -> None:
    ended = zoo(world, tmp_path, kind, *given)
    assert ended.codes == [2] * world, ended.printed
    assert said in ended.printed
    assert "Traceback" not in ended.printed
    assert not (tmp_path / "straight/zoo/ledger.jsonl").exists()


@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_objects_that_change_nothing_in_the_training_are_no_state(tmp_path: Path, world: int, kind: str) -> None:
    assert_resumes(world, tmp_path, kind, "model._target_=zoo.hidden.Activations")


def test_seconds_that_a_task_measures_are_no_state_that_matters(tmp_path: Path) -> None:
    ended = zoo(1, tmp_path, "single", "task._target_=zoo.hidden.Timed")
    assert ended.codes == [0], ended.printed


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "fsdp")])
def test_a_layer_that_is_frozen_on_the_way_stays_frozen(tmp_path: Path, world: int, kind: str) -> None:
    assert_resumes(world, tmp_path, kind, "model._target_=zoo.hidden.Freezing")


def test_the_self_test_can_be_turned_off(tmp_path: Path) -> None:
    ended = zoo(1, tmp_path, "single", "model._target_=zoo.hidden.InAnObject", "checkpoint.self_test=false")
    assert ended.codes == [0], ended.printed


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp")])
def test_an_optimizer_that_fails_in_its_second_step_is_refused_before_the_first(
    tmp_path: Path, world: int, kind: str
) -> None:
    given = ("model._target_=zoo.models.SparseEmbedding", "optimizer=bare", "+optimizer.momentum=0.9")
    ended = zoo(world, tmp_path, kind, *given)
    assert ended.codes == [2] * world, ended.printed
    assert "a later step fails: " in ended.printed
    assert "table.weight have sparse gradients: use sparse=False" in ended.printed
    assert not (tmp_path / "straight/zoo/ledger.jsonl").exists()


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp")])
def test_a_teacher_that_the_task_makes_at_its_first_step_is_named(tmp_path: Path, world: int, kind: str) -> None:
    ended = zoo(world, tmp_path, kind, "task._target_=zoo.hidden.Teacher", "evaluate.every=null")
    assert ended.codes == [2] * world, ended.printed
    assert "because of task.teacher (Plain)" in ended.printed


@pytest.mark.parametrize("self_test", ["true", "false"])
@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_an_optimizer_group_that_is_added_on_the_way_is_refused(
    tmp_path: Path, world: int, kind: str, self_test: str
) -> None:
    given = ("optimizer=bare", "optimizer._target_=zoo.optimizers.AddsAGroup", f"checkpoint.self_test={self_test}")
    ended = zoo(world, tmp_path, kind, *given)
    assert ended.codes == [2] * world, ended.printed
    assert "the optimizer has another number of groups than when it was made (3, not 2)" in ended.printed
    assert "Traceback" not in ended.printed


def test_a_value_that_is_no_number_is_saved_like_any_other(tmp_path: Path) -> None:
    assert_resumes(1, tmp_path, "single", "model._target_=zoo.hidden.NotANumber")
