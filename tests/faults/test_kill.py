"""Kill -9 anything at any time: what goes on afterwards is the uninterrupted run, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import kill_points
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist
WORLD = 2
STEPS = 12
POINTS: dict[str, tuple[Callable[[int], None], int, tuple[int, ...]]] = {
    # name: how to die there, how often a run of 12 steps comes by, which ranks come by
    "at a step": (kill_points.at_step, STEPS, (0, 1)),
    "between gradient and update": (kill_points.in_step, STEPS, (0, 1)),
    **kill_points.SAVE_POINTS,
    "in an evaluation": (kill_points.in_evaluation, 2, (0, 1)),
    "after an evaluation": (kill_points.after_evaluation, 2, (0, 1)),
}


def cases() -> list[tuple[str, int, int, bool]]:
    """Every point with each rank that comes by, at a seeded moment; with the other rank left alive, or all killed."""
    draws = random.Random(20)
    return [
        (point, draws.randint(1, often), rank, draws.random() < 0.4)
        for point, (_, often, ranks) in POINTS.items()
        for rank in ranks
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(WORLD, root).codes == [0, 0]
    return root


def assert_same_run(root: Path, undisturbed: Path) -> None:
    assert ledger(root) == ledger(undisturbed)
    newest, other = locate(folder(root).url), locate(folder(undisturbed).url)
    assert newest[1].startswith(f"checkpoints/step-{STEPS:08d}")
    assert list(differences(newest, other)) == []


@pytest.mark.parametrize(("point", "number", "victim", "everything"), cases())
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, point: str, number: int, victim: int, everything: bool
) -> None:
    trap = POINTS[point][0]

    def lay(rank: int) -> None:
        if rank == victim:
            trap(number)

    killed = train(WORLD, tmp_path, before=lay, all_die=everything)
    assert killed.codes[victim] == -9, killed.printed
    resumed = train(WORLD, tmp_path)
    assert resumed.codes == [0, 0], resumed.printed
    assert_same_run(tmp_path, undisturbed)


def test_a_run_that_is_killed_again_and_again_arrives(undisturbed: Path, tmp_path: Path) -> None:
    draws = random.Random(5)
    for _ in range(6):
        victim, step = draws.randint(0, 1), draws.randint(2, STEPS)
        train(WORLD, tmp_path, before=lambda rank, v=victim, s=step: kill_points.at_step(s) if rank == v else None)  # type: ignore[misc]
    assert train(WORLD, tmp_path).codes == [0, 0]
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("kind", ["fsdp", "single"])
def test_other_ways_to_spread_the_model_resume_to_the_bit_too(tmp_path: Path, kind: str) -> None:
    world = 1 if kind == "single" else WORLD
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root in (whole, broken):
        root.mkdir()
    assert train(world, whole, f"parallel={kind}").codes == [0] * world
    train(world, broken, f"parallel={kind}", before=lambda rank: kill_points.in_step(7))
    assert train(world, broken, f"parallel={kind}").codes == [0] * world
    assert_same_run(broken, whole)
