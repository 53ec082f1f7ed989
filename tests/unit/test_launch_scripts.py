"""A script of the user's own is for run and submit; check says so."""

from __future__ import annotations

import pytest

from everstep.launch import __main__ as command


@pytest.mark.parametrize("verb", ["check"])
@pytest.mark.parametrize("given", [[], ["job=slurm"], ["--config-dir", "conf"]])
def test_a_script_after_dashes_is_answered_with_what_starts_it(
    verb: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([verb, *given, "--", "train.py", "--epochs", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"everstep: {verb} takes no script after '--': ")
    assert "torchrun --nproc-per-node N train.py" in said
    assert said.count("\n") == 1


def test_a_script_for_this_machine_is_answered_with_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["submit", "job=local", "--", __file__]) == 2
    assert "or torchrun for a script" in capsys.readouterr().err
