"""`check` takes the first step on the CPU: what would fail in the first second of a run is one line before it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from everstep.compose import compose
from everstep.trainer.preflight.check import examine
from everstep.trainer.preflight.first_step import TookTooLongError, _at_most

TESTS = Path(__file__).parent.parent


def problems(*words: str, world: int = 1) -> list[str]:
    return examine(compose(["experiment=zoo", *words], [str(TESTS / "conf")]).run, world).problems


@pytest.mark.parametrize("model", ["BatchNorm", "ExtraDict", "Complex", "Scalar", "Expanded", "Replaced", "Hooked"])
def test_models_that_train_are_fine(model: str) -> None:
    assert problems(f"model._target_=zoo.models.{model}") == []


@pytest.mark.parametrize(("words", "said"), [
    (["task._target_=zoo.models.Mean"], "task.loss returned a Tensor: return Loss(sum=…, count=…)"),
    (["task._target_=zoo.models.PerSample"], "task.loss returned Loss(sum=[2]): sum must be one number"),
    (["task._target_=zoo.models.Matrix"], "a metric 'matrix' of shape [2, 2]: a metric is one number"),
    (["task._target_=zoo.models.Broken"], "task.loss fails: ZeroDivisionError: integer division"),
    (["model._target_=zoo.models.SparseEmbedding"], "table.weight have sparse gradients: use sparse=False, torch"),
    (["data._target_=zoo.data.doubles"], "x, y are float64 and the model's weights are not: set data.cast={x: "),
    (["model._target_=zoo.models.Forgetful"], "self-test: model._extra_state.n does not come back"),
    (["model._target_=zoo.models.Unsavable"], "_extra_state.lock is a builtins.object"),
    (["model._target_=zoo.models.Lazy"], "has no shape yet (a lazy module): run one forward pass in model()"),
    (["evaluate.metric=acc"], "evaluate.metric='acc': the task measures loss; choose one"),
    (["optimizer._target_=zoo.optimizers.Unsavable", "optimizer=bare"], "lock is a builtins.object"),
    (["model._target_=zoo.hidden.InAnObject"], "self-test: after a resume the loss of step 4"),
    (["model._target_=zoo.hidden.FromTheClock"], "takes something from outside, such as the time"),
    (["task._target_=zoo.hidden.Weighted"], "because of task.meter (Meter), which a checkpoint does not hold"),
    (["optimizer=bare", "optimizer._target_=zoo.hidden.Decaying"], "optimizer.meter (Meter), which a checkpoint"),
    (["optimizer=bare", "optimizer._target_=torch.optim.LBFGS"], "LBFGS doesn't support per-parameter options"),
])  # fmt: skip
def test_a_first_step_that_would_fail_is_one_line(words: list[str], said: str) -> None:
    (found,) = problems(*words)
    assert said in found
    assert "\n" not in found


def test_a_parameter_that_ddp_would_wait_for_names_the_key() -> None:
    (found,) = problems("model._target_=zoo.models.Unused", "parallel=ddp", world=2)
    assert found.startswith("parallel.find_unused=false: spare.weight and 1 more got no gradient")
    assert problems("model._target_=zoo.models.Unused", "parallel=ddp", "parallel.find_unused=true", world=2) == []


def test_sparse_gradients_and_shards_do_not_go_together() -> None:
    found = problems("model._target_=zoo.models.SparseEmbedding", "optimizer=bare", "parallel=fsdp", world=2)
    assert found == ["parallel=fsdp: table has sparse=True, and shards have no sparse gradients; use parallel=ddp, or "
                     "sparse=False"]  # fmt: skip


def test_code_that_catches_all_exceptions_does_not_outlast_the_time_limit() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                while True:
                    pass

    with pytest.raises(TookTooLongError), _at_most(0.05):
        stubborn()
