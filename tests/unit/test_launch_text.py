"""Tables: as wide as a terminal has room for, and everything for other programs."""

from __future__ import annotations

import re
import sys

import pytest

from everstep.launch.console import print_table

COLUMNS = ("run", "rate", "where", "age")
ROWS = [["a" * 30, "2.3/s", "slurm 4711 on node-0017 +3", "16 min 41 s"]]


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_table(COLUMNS, ROWS, spare=("age", "rate"))
    return re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize(("width", "shown", "left_out"), [
    (100, ["run", "rate", "where", "age"], []),
    (70, ["run", "rate", "where"], ["a wider terminal has room for: age"]),
    (60, ["run", "where"], ["a wider terminal has room for: rate, age"]),
])  # fmt: skip
def test_what_a_terminal_has_no_room_for_is_left_out_and_nothing_wraps(
    width: int, shown: list[str], left_out: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    head, row, *more = printed(capsys)
    assert head.split() == shown
    assert "slurm 4711 on node-0017 +3" in row
    assert more == left_out


def test_other_programs_are_given_every_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert [line.split()[-1] for line in printed(capsys)] == ["age", "s"]
