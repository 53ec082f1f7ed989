"""What Tab offers."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.launch.__main__ import main
from everstep.launch.cli.completion import OPTIONS, SCRIPTS, candidates
from everstep.launch.parser import VERBS


def test_verbs_come_first() -> None:
    assert candidates(["ch"]) == ["check", "checkpoint"]
    assert "run" in candidates([""])


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_option_of_a_verb_is_offered(verb: str) -> None:
    parser = importlib.import_module(VERBS[verb][0])._parser()
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    assert sorted({*known} - {"--help"}) == OPTIONS[verb]


def test_groups_offer_their_options() -> None:
    assert candidates(["run", "parallel=f"]) == ["parallel=fsdp"]
    assert candidates(["run", "precision="]) == ["precision=bf16", "precision=fp16", "precision=fp32", "precision=fp64"]


def test_keys_open_like_folders() -> None:
    assert candidates(["run", "check"]) == ["checkpoint.", "checkpoint="]
    assert "checkpoint.every=" in candidates(["run", "checkpoint."])
    assert candidates(["run", "job.nproc"]) == ["job.nproc="]
    assert candidates(["run", "log.wandb.e"]) == ["log.wandb.enabled=", "log.wandb.entity="]


def test_the_users_own_configs_are_offered(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    assert candidates(["run", "--config-dir", str(tmp_path), "experiment=m"]) == ["experiment=mine"]
    assert candidates(["run", f"--config-dir={tmp_path}", "experiment=m"]) == ["experiment=mine"]


def test_runs_are_offered_by_name(tmp_path: Path) -> None:
    for name in ("demo", "digits-1", ".hidden"):
        (tmp_path / name).mkdir()
    assert candidates(["run", f"run_root={tmp_path}", "run=d"]) == ["run=demo", "run=digits-1"]


def test_a_run_is_offered_to_the_verbs_that_take_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "digits-1", ".hidden"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for verb in ("status", "logs", "cancel", "resume"):
        assert candidates([verb, "d"]) == ["demo", "digits-1"]
    assert candidates(["cancel", "demo", "di"]) == ["digits-1"]
    assert candidates(["status", "demo", "di"]) == []
    assert candidates(["status", "--root", str(tmp_path / "runs"), "de"]) == ["demo"]
    assert candidates(["resume", "demo", "checkpoint.ev"]) == ["checkpoint.every="]
    assert candidates(["logs", "--t"]) == ["--tail"]
    assert candidates(["ls", "--j"]) == ["--json"]


def test_half_a_command_line_is_answered_with_silence(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run", "~"], ["run", "=x"], ["nosuch", "x"], ["run", "run_root=/nosuch", "run="]):
        assert main(["__complete", *words]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bas"]) == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err


@pytest.mark.process
def test_tab_imports_no_large_package() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "everstep.launch", "__complete", "run", "parallel="]
    listed = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed.splitlines()}
    assert "everstep" in imported
    assert not imported & {"torch", "hydra", "numpy", "pyarrow", "rich", "fsspec", "pandas", "wandb", "optuna"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("everstep ru", ["run "]),
        ("everstep run parallel=f", ["fsdp "]),
        ("everstep run job.np", ["job.nproc="]),
        ("everstep checkpoint ", ["diff ", "export ", "ls ", "rm ", "verify "]),
    ],
)
def test_bash_gets_what_readline_wants(line: str, offered: list[str]) -> None:
    script = f"""{SCRIPTS["bash"]}
everstep() {{ {sys.executable} -m everstep.launch "$@"; }}
COMP_LINE={line!r} COMP_POINT={len(line)} COMP_WORDBREAKS=$' \\t\\n=:'
_everstep
printf '<%s>\\n' "${{COMPREPLY[@]}}"
"""
    answered = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert answered.stdout.split("\n")[:-1] == [f"<{word}>" for word in offered], answered.stderr


@pytest.mark.process
@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_can_read_its_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    checked = subprocess.run([shell, "-n"], input=SCRIPTS[shell], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
