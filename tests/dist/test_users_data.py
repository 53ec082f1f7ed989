"""Data as people bring it, with random transforms: exact by every loader setting, world and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.data.ordering.trace import Trace
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, ledger, train

pytestmark = pytest.mark.dist
ROUTES = [
    "loader.prefetch=2",
    "loader.workers=2",
    "loader.workers=2 loader.prefetch=2 loader.worker=thread",
]


def of(data: str, *overrides: str) -> list[str]:
    return [
        "plugins=[support.toy,support.random_datasets]",
        f"data._target_=support.random_datasets.{data}",
        *overrides,
    ]


def run(root: Path, world: int, overrides: list[str]) -> Path:
    ended = train(world, root, *overrides)
    assert ended.codes == [0] * world, ended.printed
    return root


def differing(first: Path, second: Path) -> list[str]:
    return [str(difference) for difference in differences(locate(folder(first).url), locate(folder(second).url))]


def losses(root: Path, kind: str = "train", name: str = "loss") -> list[float]:
    return [record[name] for record in read_metrics(folder(root), kind).values()]


@pytest.fixture(scope="module", params=["torch", "numpy", "python", "own"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run whose transforms draw from one kind of generator, and its overrides."""
    overrides = of("drawing", f"data.kind={request.param}")
    return run(tmp_path_factory.mktemp(request.param), 1, overrides), overrides


@pytest.mark.parametrize("route", ROUTES)
def test_no_loader_setting_changes_a_bit_of_the_model(
    drawn: tuple[Path, list[str]], tmp_path: Path, route: str
) -> None:
    whole, overrides = drawn
    run(tmp_path, 1, [*overrides, *route.split()])
    assert differing(tmp_path, whole) == []
    assert losses(tmp_path, "evaluate") == losses(whole, "evaluate")


def test_a_resume_with_other_loader_settings_ends_with_the_same_bits(
    drawn: tuple[Path, list[str]], tmp_path: Path
) -> None:
    whole, overrides = drawn
    run(tmp_path, 1, [*overrides, "steps=5", *ROUTES[2].split()])
    run(tmp_path, 1, [*overrides, "steps=12", "loader.prefetch=2"])
    assert differing(tmp_path, whole) == []


def test_other_worlds_have_the_same_draws(drawn: tuple[Path, list[str]], tmp_path: Path) -> None:
    whole, overrides = drawn
    run(tmp_path, 2, [*overrides, "steps=5"])
    run(tmp_path, 3, [*overrides, "steps=12", "loader.workers=1"])
    assert ledger(tmp_path) == ledger(whole)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-9)
    assert losses(tmp_path, "evaluate")[-1] == pytest.approx(losses(whole, "evaluate")[-1], rel=1e-9)


@pytest.mark.parametrize("route", ["loader.prefetch=0", *ROUTES])
def test_numbers_that_a_dataset_throws_away_leave_dropout_alone(tmp_path: Path, route: str) -> None:
    run(tmp_path / "quiet", 1, of("quiet"))
    run(tmp_path / "thrown", 1, of("thrown_away", *route.split()))
    assert differing(tmp_path / "quiet", tmp_path / "thrown") == []


@pytest.mark.parametrize("world", [1, 2])
def test_workers_never_share_a_file_that_a_dataset_opens_when_it_is_first_read(tmp_path: Path, world: int) -> None:
    run(tmp_path, world, of("opens_its_file", "loader.workers=2", "steps=7"))
    run(tmp_path, world, of("opens_its_file", "loader.workers=2"))
    assert len(losses(tmp_path, "evaluate")) == 3


def test_a_bare_map_style_dataset_is_data(tmp_path: Path) -> None:
    run(tmp_path, 1, of("bare", "steps=1"))
    assert len(losses(tmp_path)) == 1


def test_ragged_samples_and_several_held_out_sets_are_the_same_on_every_world(tmp_path: Path) -> None:
    overrides = of("ragged", "evaluate.metric=b/mae")
    whole = run(tmp_path / "whole", 1, overrides)
    other = run(tmp_path / "other", 2, [*overrides, "loader.workers=1"])
    assert losses(other) == pytest.approx(losses(whole), rel=1e-9)
    for name in ("loss", "mae", "a/loss", "a/mae", "b/loss", "b/mae"):
        assert losses(other, "evaluate", name) == pytest.approx(losses(whole, "evaluate", name), rel=1e-9)
    a, b, both = (losses(whole, "evaluate", name)[-1] for name in ("a/mae", "b/mae", "mae"))
    assert both == pytest.approx((5 * a + 3 * b) / 8)
    records = read_metrics(folder(whole), "evaluate")
    assert [step for step, record in records.items() if "test/mae" in record] == [12]  # once, when all is done


def test_draws_by_weight_are_the_same_on_every_world_and_can_be_traced(tmp_path: Path) -> None:
    overrides = of("drawn_evenly", "evaluate.every=null")
    whole = run(tmp_path / "whole", 1, overrides)
    run(tmp_path / "other", 3, [*overrides, "steps=4"])
    other = run(tmp_path / "other", 2, overrides)
    assert ledger(other) == ledger(whole)
    assert losses(other) == pytest.approx(losses(whole), rel=1e-9)
    trace = Trace(folder(whole))
    by_step = {step: [visit.sample for visit in trace.step(step)] for step in range(1, 13)}
    assert by_step == ledger(whole)
    visits = [(visit.step, visit.place, visit.epoch) for visit in trace.visits(0)]
    assert visits == [
        (step, place, ((step - 1) * 7 + place) // 41)
        for step, samples in by_step.items()
        for place, sample in enumerate(samples)
        if sample == 0
    ]
    assert len(visits) > 10  # a quarter of the draws, of 41 samples


@pytest.mark.parametrize(("data", "said"), [
    ("stream", "can only be iterated"),
    ("clocked", "differs each time that it is read"),
])  # fmt: skip
def test_data_that_cannot_be_exact_ends_the_first_start_in_one_line(tmp_path: Path, data: str, said: str) -> None:
    ended = train(1, tmp_path, *of(data))
    assert ended.codes == [2]
    assert said in ended.printed
    assert "Traceback" not in ended.printed
