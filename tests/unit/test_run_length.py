"""The length of a run as epochs: a number once the data is known, frozen in the run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from everstep import ArrayDataset, Splits, prepare_blocks
from everstep.compose import compose
from everstep.config import UNRESOLVED, RunConfig, steps_of
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, resolve_steps, settle, start_digest, thaw
from everstep.launch.submit.override_frozen import amend
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.data.prepared import dataset, mixture
from everstep.trainer.data.tokens import tokens_per_sample


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def stored(folder: RunFolder) -> RunConfig:
    return thaw(folder.storage.read(CONFIG))


@pytest.mark.parametrize("said", ["3ep", "3 ep", "3 epochs", "3epoch", "3.0EP"])
def test_epochs_may_be_written_in_several_ways(said: str) -> None:
    run = compose(["experiment=digits", f"steps={said}"]).run
    assert run.steps == UNRESOLVED
    assert str(run.steps_given).replace(".0", "") == "3ep"
    assert f"steps: {run.steps_given}" in freeze(run)
    assert thaw(freeze(run)) == run


@pytest.mark.parametrize(("said", "steps"), [("3ep", 19), ("1ep", 7), ("0.5ep", 4), ("0.01ep", 1), (".1ep", 1)])
def test_the_number_is_that_of_the_steps_that_see_the_epochs_whole(said: str, steps: int) -> None:
    assert steps_of(said, samples=50, global_batch=8) == steps


@pytest.mark.parametrize("said", ["2e9tok", "2e9 tokens", "2E9 Token", "2.e9tok", "2e+9 tok"])
def test_tokens_may_be_written_in_several_ways(said: str) -> None:
    run = compose(["experiment=digits", f"steps={said}"]).run
    assert run.steps == UNRESOLVED
    assert steps_of(str(run.steps_given), samples=50, global_batch=8, tokens=1000) == 250_000
    assert thaw(freeze(run)) == run


@pytest.mark.parametrize(("said", "steps"), [("1tok", 1), ("800tok", 1), ("801tok", 2), ("2e3tok", 3), ("1.6e3tok", 2)])
def test_tokens_are_rounded_up_to_whole_steps(said: str, steps: int) -> None:
    assert steps_of(said, samples=50, global_batch=8, tokens=100) == steps


def test_tokens_of_samples_that_say_no_number_are_refused_with_what_to_write(folder: RunFolder) -> None:
    run = RunConfig(run="run", steps="800tok", global_batch=8)
    settle(run, folder)
    with pytest.raises(ConfigError, match="steps=800tok: the data does not say how many tokens each sample has; write"):
        resolve_steps(run, folder, samples=50)
    assert resolve_steps(run, folder, samples=50, tokens=10) == 10
    assert resolve_steps(run, folder, samples=50, tokens=20) == 10  # frozen
    assert stored(folder).steps == 10


def test_packed_data_says_how_many_tokens_a_sample_has(tmp_path: Path) -> None:
    sources = [(f"{number}.txt", b"some text to be cut " * 20) for number in range(60)]
    packs = {}
    for name, block in (("a", 16), ("b", 16), ("c", 8)):
        prepare_blocks(sources, str(tmp_path / name), block)
        packs[name] = dataset(str(tmp_path / name))
    assert [tokens_per_sample(splits) for splits in packs.values()] == [16, 16, 8]
    mixed = [mixture([{"path": str(tmp_path / name), "weight": 1} for name in names]) for names in ("ab", "ac")]
    assert [tokens_per_sample(splits) for splits in mixed] == [16, None]
    assert tokens_per_sample(replace(packs["a"], collate=dict)) is None
    assert tokens_per_sample(Splits(ArrayDataset({"tokens": np.zeros((3, 5))}))) is None


@pytest.mark.parametrize(("said", "fix"), [
    ("0ep", "must be > 0"),
    ("three", "write a whole number of steps, epochs as 3ep, or tokens as 2e9tok"),
    ("3 epochen", "write a whole number of steps, epochs as 3ep, or tokens as 2e9tok"),
    ("0tok", "must be > 0"),
    ("2e999tok", "write a whole number of steps"),
    ("tok", "write a whole number of steps"),
    ("2.5", "write a whole number of steps"),
    ("true", "write a whole number of steps"),
    ("-1", "must be ≥ 1"),
])  # fmt: skip
def test_another_length_is_refused_in_one_line_with_what_to_write(said: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix) as caught:
        compose(["experiment=digits", f"steps={said}"])
    assert "steps=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_note_of_what_was_given_is_no_key_to_write() -> None:
    with pytest.raises(ConfigError, match="steps_given=3ep is set by itself; write steps=3ep"):
        compose(["experiment=digits", "steps_given=3ep"])


def test_the_number_is_frozen_at_the_first_start_and_stays(folder: RunFolder) -> None:
    run = RunConfig(run="run", steps="3ep", global_batch=8)
    settle(run, folder)
    assert resolve_steps(run, folder, samples=50) == 19
    assert stored(folder).steps == 19
    assert resolve_steps(run, folder, samples=5000) == 19
    assert settle(run, folder) == []
    assert stored(folder).steps == 19


def test_other_epochs_on_a_resume_become_a_number_again(folder: RunFolder) -> None:
    settle(RunConfig(run="run", steps="3ep", global_batch=8), folder)
    resolve_steps(stored(folder), folder, samples=50)
    longer = RunConfig(run="run", steps="5ep", global_batch=8)
    assert [str(change) for change in settle(longer, folder)] == ["steps: 19 → 5ep"]
    assert resolve_steps(longer, folder, samples=50) == 32
    number = RunConfig(run="run", steps=40, global_batch=8)
    assert [str(change) for change in settle(number, folder)] == ["steps: 32 → 40"]
    assert (stored(folder).steps, stored(folder).steps_given) == (40, None)


def test_the_digest_of_a_start_does_not_depend_on_the_number_that_epochs_become(folder: RunFolder) -> None:
    run = RunConfig(run="run", steps="3ep", global_batch=8)
    settle(run, folder)
    resolve_steps(run, folder, samples=50)
    assert start_digest(run) == start_digest(stored(folder))
    assert start_digest(run) != start_digest(RunConfig(run="run", steps="5ep", global_batch=8))


@pytest.mark.parametrize(("said", "steps", "given"), [("40", 40, None), ("5ep", UNRESOLVED, "5ep")])
def test_a_resume_may_change_it_on_the_command_line(
    folder: RunFolder, said: str, steps: int, given: str | None
) -> None:
    settle(RunConfig(run="run", steps="3ep", global_batch=8), folder)
    resolve_steps(stored(folder), folder, samples=50)
    changed, _ = amend(stored(folder), {}, [f"steps={said}"])
    assert (changed.steps, changed.steps_given) == (steps, given)
