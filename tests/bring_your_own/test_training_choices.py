"""A schedule and parameter groups of one's own: resumed to the bit, and with the same figures on another world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.resume_checks import PLACES, assert_resumes, cut_off, state, training_records, zoo
from zoo.models import Plain

pytestmark = pytest.mark.dist

SCHEDULE = ("schedule._target_=zoo.schedules.power", "schedule.args={exponent: 2}", "schedule=constant",
            "schedule.warmup_steps=2")  # fmt: skip
MUON = ("optimizer=muon_adamw", "model._target_=zoo.models.Hidden")
GROUPS = (
    'optimizer.groups=[{match: "net.0.*", frozen: true}, {match: "net.2.weight", lr_scale: 10, weight_decay: 0}]',
)


@pytest.mark.parametrize(("world", "kind"), PLACES)
@pytest.mark.parametrize("given", [SCHEDULE, GROUPS, MUON], ids=["schedule", "groups", "muon"])
def test_a_choice_of_ones_own_resumes_to_the_bit(tmp_path: Path, world: int, kind: str, given: tuple[str, ...]) -> None:
    assert_resumes(world, tmp_path, kind, *given)


@pytest.mark.parametrize(("world", "kind"), PLACES[1:])
@pytest.mark.parametrize("given", [SCHEDULE, GROUPS, MUON], ids=["schedule", "groups", "muon"])
def test_a_choice_of_ones_own_gives_the_same_figures_on_another_world(
    tmp_path: Path, world: int, kind: str, given: tuple[str, ...]
) -> None:
    straight = zoo(1, tmp_path, "single", *given, "precision=fp64")
    assert straight.codes == [0], straight.printed
    cut_off(tmp_path)
    again = zoo(world, tmp_path, kind, *given, "precision=fp64", side="resumed")
    assert again.codes == [0] * world, again.printed
    one, other = state(tmp_path, "straight"), state(tmp_path, "resumed")
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


def test_the_rates_of_a_run_are_those_of_the_function(tmp_path: Path) -> None:
    assert zoo(1, tmp_path, "single", *SCHEDULE).codes == [0]
    rates = [record["lr"] for record in training_records(tmp_path, "straight")]
    assert rates == pytest.approx([0.05 * factor for factor in (0.5, 1, 0.5625, 0.25, 0.0625, 0)])


@pytest.mark.parametrize(("world", "kind"), PLACES)
def test_a_frozen_group_keeps_its_weights_and_has_no_state(tmp_path: Path, world: int, kind: str) -> None:
    ended = zoo(world, tmp_path, kind, *GROUPS)
    assert ended.codes == [0] * world, ended.printed
    end = state(tmp_path, "straight")
    assert not any(name.startswith("optimizer.net.0.") for name in end)
    assert any(name.startswith("optimizer.net.2.") for name in end)
    first = zoo(1, tmp_path, "single", *GROUPS, "steps=1", "optimizer.lr=0", side="first")
    assert first.codes == [0], first.printed
    start = state(tmp_path, "first")
    assert torch.equal(end["model.net.0.weight"], start["model.net.0.weight"])
    assert not torch.equal(end["model.net.2.weight"], start["model.net.2.weight"])


@pytest.mark.parametrize(("given", "said"), [
    ('optimizer.groups=[{match: "nett.*"}]', "optimizer.groups: 'nett.*' matches no parameter; did you mean 'net.*'?"),
    ("schedule._target_=zoo.schedules.powr", "has no 'powr'; did you mean 'power'?"),
])  # fmt: skip
def test_a_mistake_ends_the_first_start_in_one_line(tmp_path: Path, given: str, said: str) -> None:
    ended = zoo(2, tmp_path, "ddp", given)
    assert ended.codes == [2, 2]
    assert said in ended.printed
    assert "Traceback" not in ended.printed


def test_another_schedule_or_group_on_a_resume_is_refused(tmp_path: Path) -> None:
    assert zoo(1, tmp_path, "single", *SCHEDULE).codes == [0]
    cut_off(tmp_path)
    for given in (("schedule.args={exponent: 3}",), GROUPS):
        ended = zoo(1, tmp_path, "single", *SCHEDULE, *given, side="resumed")
        assert ended.codes == [2]
        assert "was started with another config" in ended.printed


@pytest.mark.parametrize(("world", "kind"), PLACES)
def test_epochs_become_a_number_at_the_first_start_and_a_resume_keeps_it(tmp_path: Path, world: int, kind: str) -> None:
    straight = zoo(1, tmp_path, "single", "steps=1 epoch", "precision=fp64")
    assert straight.codes == [0], straight.printed
    config = (tmp_path / "straight/zoo/config.yaml").read_text()
    steps = int(config.split("\nsteps: ")[1].split("\n")[0])
    assert steps == 6
    cut_off(tmp_path)
    again = zoo(world, tmp_path, kind, "steps=1ep", "precision=fp64", side="resumed")
    assert again.codes == [0] * world, again.printed
    assert training_records(tmp_path, "resumed")[-1]["step"] == steps
    done = zoo(world, tmp_path, kind, "steps=1ep", "precision=fp64", side="resumed")
    assert done.codes == [0] * world, done.printed
    assert f"is done: step {steps} of {steps}" in done.printed
    longer = zoo(world, tmp_path, kind, "steps=1.5ep", "precision=fp64", side="resumed")
    assert longer.codes == [0] * world, longer.printed
    assert training_records(tmp_path, "resumed")[-1]["step"] > steps


@pytest.mark.parametrize(("world", "kind"), PLACES)
def test_other_peoples_weights_give_the_same_figures_on_each_world_and_resume_on_another(
    tmp_path: Path, world: int, kind: str
) -> None:
    torch.manual_seed(5)
    given = {f"old.{name}": value.bfloat16() for name, value in Plain().state_dict().items()}
    save_file(given, tmp_path / "old.safetensors")
    (tmp_path / "map.yaml").write_text('"old.*": "*"\n')
    words = (f"init_from={tmp_path}/old.safetensors", f"init_map={tmp_path}/map.yaml", "precision=fp64")
    first = zoo(world, tmp_path, kind, *words, "steps=1", "optimizer.lr=0", side="first")
    assert first.codes == [0] * world, first.printed
    start = state(tmp_path, "first")
    assert all(torch.equal(start[f"model.{n[4:]}"], value.double()) for n, value in given.items())
    straight = zoo(world, tmp_path, kind, *words)
    assert straight.codes == [0] * world, straight.printed
    cut_off(tmp_path)
    (tmp_path / "old.safetensors").unlink()  # a resume does not need it
    again = zoo(1 if world > 1 else 2, tmp_path, "single" if world > 1 else "ddp", *words, side="resumed")
    assert set(again.codes) == {0}, again.printed
    one, other = state(tmp_path, "straight"), state(tmp_path, "resumed")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("world", "kind"), PLACES)
def test_weights_of_another_shape_end_the_first_start_in_one_line(tmp_path: Path, world: int, kind: str) -> None:
    torch.save({**Plain().state_dict(), "net.2.weight": torch.ones(1, 9)}, tmp_path / "w.pt")
    ended = zoo(world, tmp_path, kind, f"init_from={tmp_path}/w.pt")
    assert ended.codes == [2] * world
    assert (
        "net.2.weight is [1, 9] there, [1, 8] in the model; name the weights to take with init_match" in ended.printed
    )
    assert "Traceback" not in ended.printed


def test_a_map_may_be_written_on_the_command_line(tmp_path: Path) -> None:
    torch.save({f"old.{name}": value for name, value in Plain().state_dict().items()}, tmp_path / "w.pt")
    ended = zoo(1, tmp_path, "single", f"init_from={tmp_path}/w.pt", "init_map={old.*: '*'}")
    assert ended.codes == [0], ended.printed
