"""Optimizers that take turns: the same on any world and after a resume; a step trains its turn's weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_metrics
from support import kill_points
from support.ranks import folder, train

pytestmark = pytest.mark.dist
ADVERSARIES = "experiment=adversaries"
MINE = (
    ADVERSARIES,
    "~optimizer.optimizers",
    "~optimizer.turns",
    "optimizer._target_=support.adversaries.pair",
)
KINDS = [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "hsdp")]


def losses(root: Path, run: str = "toy") -> list[tuple[float, float, float]]:
    """Loss, norm and rate of each step: the norm is that of the turn's gradients alone."""
    return [(each["loss"], each["norm"], each["lr"]) for each in read_metrics(folder(root, run)).values()]


def held_out(root: Path, run: str = "toy") -> list[float]:
    return [each["mae"] for each in read_metrics(folder(root, run), "evaluate").values()]


def assert_equal(root: Path, other: Path, run: str = "toy") -> None:
    assert len(losses(root, run)) == 12
    for found, wanted in zip(losses(root, run), losses(other), strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)
    assert held_out(root, run) == pytest.approx(held_out(other), rel=1e-9)


def moved(run: RunFolder, first: int, second: int) -> set[str]:
    """Return the networks and their optimizer's state that differ between two steps of a run."""
    sides = (locate(f"{run.url}/checkpoints/step-{step:08d}-attempt-0001") for step in (first, second))
    names = [found.name for found in differences(*sides)]
    return {".".join(name.split(".")[:2]) for name in names if not name.startswith("average.")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    ended = train(1, root, ADVERSARIES)
    assert ended.codes == [0], ended.printed
    return root


@pytest.mark.parametrize(("world", "kind"), KINDS)
def test_every_parallelism_gives_the_steps_of_one_process(alone: Path, tmp_path: Path, world: int, kind: str) -> None:
    ended = train(world, tmp_path, ADVERSARIES, f"parallel={kind}")
    assert ended.codes == [0] * world, ended.printed
    assert_equal(tmp_path, alone)


@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_a_step_changes_weights_and_state_of_its_turn_alone(tmp_path: Path, world: int, kind: str) -> None:
    words = ("checkpoint.every=1", "checkpoint.keep_last=20", "steps=6", f"parallel={kind}")
    assert train(world, tmp_path, ADVERSARIES, *words).codes == [0] * world
    for step in range(2, 7):
        turn = ("critic", "critic", "generator")[(step - 1) % 3]
        assert moved(folder(tmp_path), step - 1, step) == {f"model.{turn}", f"optimizer.{turn}"}


def test_a_metric_of_one_turn_is_reported_for_its_steps_alone(alone: Path) -> None:
    named = [{key for key in each if key.endswith("_loss")} for each in read_metrics(folder(alone)).values()]
    assert named == [{"critic_loss"}, {"critic_loss"}, {"generator_loss"}] * 4


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_a_killed_run_goes_on_with_the_turn_on_another_world(alone: Path, tmp_path: Path, stop: int) -> None:
    def trap(rank: int) -> None:
        if rank == 1:
            kill_points.in_step(stop)

    every = "checkpoint.every=1"
    killed = train(3, tmp_path, ADVERSARIES, every, before=trap, all_die=True)
    assert killed.codes[1] == -9, killed.printed
    assert train(2, tmp_path, ADVERSARIES, every, "parallel=fsdp").codes == [0] * 2
    assert_equal(tmp_path, alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resume_on_the_same_world_gives_the_bits_of_the_uninterrupted_run(tmp_path: Path, kind: str) -> None:
    words = (ADVERSARIES, f"parallel={kind}")
    assert train(2, tmp_path, *words, run="whole").codes == [0] * 2
    for steps in ("steps=5", "steps=9", "steps=12"):
        assert train(2, tmp_path, *words, "schedule.over_steps=12", steps, run="parts").codes == [0] * 2
    assert list(differences(*(locate(folder(tmp_path, run).url) for run in ("whole", "parts")))) == []


def test_the_batch_does_not_depend_on_the_microbatch(tmp_path: Path) -> None:
    for size in (7, 3, 1):
        words = (
            f"micro_batch={size}",
            "task._target_=support.adversaries.StillTask",
            "data._target_=support.toy.plain_data",
        )
        assert train(1, tmp_path, ADVERSARIES, *words, run=f"of{size}").codes == [0]
    for size in (3, 1):
        for found, wanted in zip(losses(tmp_path, f"of{size}"), losses(tmp_path, "of7"), strict=True):
            assert found == pytest.approx(wanted, rel=1e-9)


def test_optimizers_that_a_project_makes_itself_take_turns(tmp_path: Path) -> None:
    words = (*MINE, "checkpoint.every=1", "checkpoint.keep_last=20", "steps=3")
    ended = train(1, tmp_path, *words)
    assert ended.codes == [0], ended.printed
    assert moved(folder(tmp_path), 1, 2) == {"model.critic", "optimizer.critic"}
    assert moved(folder(tmp_path), 2, 3) == {"model.generator"}


@pytest.mark.parametrize(("words", "said"), [
    (("task._target_=support.adversaries.ForgetfulTask",),
     "step 3 is the turn of 'generator', and none of its parameters got a gradient"),
    (("task._target_=support.adversaries.TurnlessTask",), "the loss of TurnlessTask takes no turn; write loss(self, "),
    (("task._target_=support.adversaries.BiasedTask",), "optimizer.optimizers: none trains bias; match it in one of "),
    (("optimizer.optimizers.critic.match=crtic.*",), "critic.match='crtic.*': matches no parameter that is trained; "
     "did you mean 'critic.*'?"),
    (('optimizer.optimizers.critic.match=["critic.*", "*.0.bias"]',),
     "generator.0.bias is matched by critic and by generator; let the patterns of one leave it out"),
    (("optimizer.turns=[critic,genrator]",), "there is no optimizer 'genrator'; did you mean 'generator'?"),
    (("optimizer.turns=[]",), "optimizer.turns=[]: must be a list of names; write turns: [critic, generator]"),
    (("optimizer.turns=[critic]",), "optimizer.turns=['critic']: 'generator' has no turn"),
    (("+optimizer.lr=1",), "optimizer.lr=1: optimizers that alternate have no 'lr'"),
    (("optimizer.optimizers.critic.rho=1",), "optimizer.optimizers.critic.rho: torch.optim.AdamW takes no 'rho'"),
])  # fmt: skip
def test_a_mistake_is_refused_in_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    ended = train(1, tmp_path, ADVERSARIES, "checkpoint.self_test=false", *words)
    assert ended.codes == [2]
    assert [line for line in ended.printed.splitlines() if said in line], ended.printed
