"""`everstep registry promote --if`: candidate and champion are measured on the same samples, and one promoter wins."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import ConfigError
from everstep.launch import promotion
from everstep.launch.__main__ import main
from everstep.launch.promotion import Verdict
from everstep.registry.registry import Registry

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]

CONDITION = "accuracy >= prod.accuracy - 0.001"


def everstep(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "everstep.launch", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def ok(*words: str, cwd: Path) -> str:
    ended = everstep(*words, cwd=cwd)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 is of a run of 40 steps, version 2 of one step; a folder with runs, exports and the registry."""
    root = tmp_path_factory.mktemp("promotion")
    for number, (run, steps) in enumerate((("good", 40), ("poor", 1)), 1):
        ok("run", "experiment=digits", f"run={run}", f"steps={steps}", "job.nproc=1", cwd=root)
        ok("export", run, "--format", "safetensors", "--out", f"out{number}", cwd=root)
        ok("registry", "add", "models", "spam", f"out{number}", cwd=root)
    return root


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the registry, with the current folder beside it."""
    shutil.copytree(trained / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def promote(place: Path, number: int, condition: str = CONDITION, *more: str) -> subprocess.CompletedProcess[str]:
    return everstep(
        "registry", "promote", "models", f"spam@{number}", "--to", "prod", "--if", condition, *more, cwd=place
    )


def test_a_worse_candidate_is_refused_with_both_figures_and_a_better_one_has_them_in_its_history(place: Path) -> None:
    first = promote(place, 2)
    assert (first.returncode, "no champion yet" in first.stdout) == (0, True), first.stdout + first.stderr
    better = promote(place, 1, CONDITION, "--why", "nightly")
    assert better.returncode == 0, better.stdout + better.stderr
    models = Registry(str(place / "models"))
    move = models.state("spam", "prod")
    assert (move.version, move.why.startswith(f"nightly; {CONDITION}: accuracy = 0.")) == (1, True)
    assert "prod.accuracy = 0." in move.why
    assert " samples, data " in move.why
    worse = promote(place, 2)
    assert worse.returncode == 1
    (line,) = [line for line in worse.stderr.splitlines() if "--if" in line]
    assert "does not hold for spam@2: accuracy = 0." in line
    assert "prod.accuracy = 0." in line
    assert models.state("spam", "prod") == move
    again = promote(place, 1)  # it is the champion already
    assert (again.returncode, models.state("spam", "prod")) == (0, move)


def test_without_a_champion_the_rest_of_the_condition_still_counts(place: Path) -> None:
    ended = promote(place, 2, f"{CONDITION} and accuracy > 0.99")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "prod.accuracy = none yet" in ended.stderr
    assert Registry(str(place / "models")).newest("spam", "prod") is None


def test_what_cannot_be_measured_is_refused_before_anything_moves(place: Path) -> None:
    for condition, said in (
        ("acuracy > 0", "did you mean 'accuracy'"),
        ("accuracy > pord.accuracy", "has no such alias"),
        ("accuracy > open('x')", "is expected at"),
    ):
        ended = promote(place, 1, condition)
        assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr
    assert promote(place, 1, CONDITION, "optimizer.lr=1").returncode == 2
    assert Registry(str(place / "models")).newest("spam", "prod") is None


def test_a_checkpoint_that_is_not_the_exported_one_is_not_measured_in_its_place(place: Path) -> None:
    path = place / "models/spam/versions/000001.json"
    record = json.loads(path.read_text())
    record["facts"]["manifest"] = "0" * 64
    path.write_text(json.dumps(record) + "\n")
    ended = promote(place, 1, "accuracy > 0")
    assert (ended.returncode, "is not the checkpoint that it was exported from" in ended.stderr) == (2, True)


def test_a_champion_that_changes_during_the_measurement_is_measured_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[int | None] = []

    def moved_meanwhile(candidate: Any, champions: Any, condition: Any, options: argparse.Namespace) -> Verdict:
        compared.append(champions["prod"] and champions["prod"].number)
        if len(compared) == 1:
            other = Registry("models")
            other.promote(other.version("spam", 2), "prod", "the other promoter")
        return Verdict("accuracy = 1", "validation")

    monkeypatch.setattr(promotion, "check_condition", moved_meanwhile)
    assert main(["registry", "promote", "models", "spam@1", "--to", "prod", "--if", CONDITION]) == 0
    assert compared == [None, 2]
    assert [move.version for move in Registry("models").history("spam", "prod")] == [2, 1]
    assert "so it is measured again" in capsys.readouterr().out


def test_a_move_made_for_another_champion_is_refused(place: Path) -> None:
    models = Registry("models")
    first = models.promote(models.version("spam", 1), "prod", after=0)
    with pytest.raises(ConfigError, match="has just moved it to version 1"):
        models.promote(models.version("spam", 2), "prod", after=0)
    assert models.promote(models.version("spam", 2), "prod", after=first.number).number == 2
