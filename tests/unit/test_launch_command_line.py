"""The command `everstep` before a verb is at work: fast, and helpful to a slip of the finger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everstep import __version__
from everstep.launch import __main__ as command
from everstep.trainer.command import verb

HEAVY = ("torch", "hydra", "omegaconf", "wandb", "fsspec", "rich", "pyarrow")


def everstep(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "everstep.launch", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def imported(*words: str, cwd: Path | None = None) -> tuple[set[str], str]:
    """Every module that a command imports, and what it prints."""
    argv = [sys.executable, "-X", "importtime", "-m", "everstep.launch", *words]
    shown = subprocess.run(argv, capture_output=True, text=True,
                           check=True, cwd=cwd)  # fmt: skip
    return {line.rsplit("|", 1)[1].strip() for line in shown.stderr.splitlines() if "|" in line}, shown.stdout


@pytest.mark.parametrize(
    ("word", "meant"), [("train", "run"), ("fit", "run"), ("stop", "cancel"), ("statsu", "status")]
)
def test_a_verb_of_another_program_is_answered_with_ours(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([word]) == 2
    assert capsys.readouterr().err == f"everstep: no verb {word!r}; did you mean {meant!r}?\n"


@pytest.mark.process
def test_help_imports_nothing_heavy() -> None:
    modules, printed = imported("--help")
    assert "everstep.launch" in modules
    assert not {module.split(".")[0] for module in modules} & set(HEAVY)
    assert not any(module.startswith("everstep.trainer") for module in modules)
    assert "everstep run" in printed


@pytest.mark.process
def test_a_dry_run_imports_nothing_that_only_a_submission_needs(tmp_path: Path) -> None:
    modules, printed = imported("submit", "--dry-run", "job=slurm", "experiment=digits", cwd=tmp_path)
    assert "everstep.storage.local" in modules
    assert not modules & {"torch", "fsspec", "rich", "everstep.storage.fsspec_backend",
                          "everstep.storage.obstore_backend",
                          "everstep.launch.submit.snapshot", "everstep.launch.schedulers.slurm.preflight"}  # fmt: skip
    assert "sbatch --parsable" in printed


@pytest.mark.process
def test_an_error_of_the_user_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    ended = everstep("run", "paralel=fsdp", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "everstep: no key 'paralel'; did you mean 'parallel'?\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["chekpoint"]) == 2
    assert "did you mean 'checkpoint'?" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["submit", "--dryrun", "job=slurm"], "no option --dryrun; did you mean '--dry-run'?"),
    (["run", "--cgf", "experiment=digits"], "no option --cgf; did you mean '--cfg'?"),
    (["status", "demo", "--json=1"], "--json: ignored explicit argument '1'; see everstep status --help"),
    (["sweep", "--dry_run", "seed=0,1"], "no option --dry_run; did you mean '--dry-run'?"),
    (["ls", "--bogus"], "no option --bogus; see everstep ls --help"),
    (["ls", "one", "two"], "'two' is more than is asked for; see everstep ls --help"),
    (["logs", "demo", "--rank", "first"], "--rank: invalid int value: 'first'; see everstep logs --help"),
    (["cancel"], "the following arguments are required: RUN; see everstep cancel --help"),
])  # fmt: skip
def test_a_mistyped_option_is_one_line_with_what_was_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    assert capsys.readouterr().err == f"everstep: {said}\n"


def test_options_of_what_the_trainer_does_are_told_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["checkpoint", "rm", "--dryrun", "runs/demo"]) == 2
    assert capsys.readouterr().err == "error: no option --dryrun; did you mean '--dry-run'?\n"


def test_a_key_in_place_of_a_verb_gets_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["experiment=digits"]) == 2
    assert "write everstep run experiment=digits" in capsys.readouterr().err


def test_the_version_is_the_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"everstep {__version__}\n"


@pytest.mark.parametrize("verb", ["checkpoint", "data"])
def test_verbs_that_need_torch_become_the_trainer(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Became(Exception):
        pass

    def execv(path: str, argv: list[str]) -> None:
        raise Became(path, argv)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Became) as became:
        command.main([verb, "ls", "runs/demo", "--help"])
    assert became.value.args == (
        sys.executable,
        [sys.executable, "-m", "everstep.trainer", verb, "ls", "runs/demo", "--help"],
    )


def test_ctrl_c_prints_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_dispatch", interrupted)
    assert command.main(["run"]) == 130
    assert capsys.readouterr().err == ""


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_TRACEBACK", "1")
    with pytest.raises(Exception, match="no key 'stepz'"):
        command.main(["run", "stepz=3"])


@pytest.mark.process
def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    piped = f"{sys.executable} -m everstep.launch --help | true"
    ended = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
