"""Names and texts of a folder from elsewhere reach a terminal, a shell and a spreadsheet as text only."""

from __future__ import annotations

import csv
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.errors import printable
from everstep.launch.__main__ import main
from everstep.launch.cli.completion import candidates
from everstep.launch.console import escape_control_sequences, print_table, say
from everstep.launch.submit.code_archive import SnapshotError
from everstep.launch.submit.snapshot import open_code
from everstep.launch.sweep.leaderboard import _cell
from everstep.run_folder import RunFolder
from support.run_records import Records

CLIPBOARD = "\x1b]52;c;cHduZWQ=\x07"
TITLE = "\x1b]0;pwned\x07"
CLEAR = "\x1b[2J\x1b[H"
C1 = "\x9b2J\x9d0;x\x9c"


@pytest.mark.parametrize("text", [CLIPBOARD, TITLE, CLEAR, C1, "\r overwritten", "\b\b\x7f", "\u202ereversed"])
def test_what_a_terminal_would_obey_is_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"run {text}")
    print_table(("run", "why"), [[f"a{text}", "b"]])
    out, err = capsys.readouterr()
    for shown in (out, err):
        assert "\\" in shown
        assert not any(letter in shown for letter in "\x1b\x07\x08\x7f\x9b\x9d\r\u202e")


def test_a_log_on_a_terminal_keeps_its_colors_and_sends_nothing_else() -> None:
    colored = b"\x1b[31mloss\x1b[0m 3\r\n\tnext"
    assert escape_control_sequences(colored) == colored
    for text in (CLIPBOARD, TITLE, CLEAR, "\x1bc", "\x1bP1$r\x1b\\", C1):
        shown = escape_control_sequences(text.encode())
        assert b"\x1b" not in shown
        assert b"\x07" not in shown
        assert b"\xc2\x9b" not in shown


@pytest.mark.process
def test_logs_of_a_hostile_run_are_text_on_a_terminal(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "evil"))
    records.attempt(1, 0)
    records.log(1, f"{CLIPBOARD}{TITLE}loss 3\n")
    parent, child = pty.openpty()
    argv = [sys.executable, "-m", "everstep.launch", "logs", str(tmp_path / "evil")]
    assert subprocess.run(argv, stdout=child, stderr=child, check=False).returncode == 0
    os.close(child)
    shown = os.read(parent, 65536)
    os.close(parent)
    assert b"loss 3" in shown
    assert b"\x1b]" not in shown


def test_a_table_of_runs_shows_what_a_claim_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(str(tmp_path / "evil"))
    records.attempt(1, 0, host=f"host{CLIPBOARD}")
    records.end(1, 10, "crashed", reason=f"{TITLE}reason")
    assert main(["ls", str(tmp_path)]) == 0
    assert main(["status", str(tmp_path / "evil")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_completion_offers_no_name_that_a_shell_would_run(tmp_path: Path) -> None:
    for name in ("x$(touch PWNED)", "`id`", "a;b", "a b", "good-1", "-rf", "a'b"):
        (tmp_path / name).mkdir()
    offered = candidates(["status", f"--root={tmp_path}", ""])
    assert [name for name in offered if not name.startswith("--")] == ["good-1"]


def test_a_cell_of_a_table_is_no_formula() -> None:
    assert [_cell(text) for text in ("=HYPERLINK(1)", "+1", "-1", "@x", "\t=1")] == [
        "'=HYPERLINK(1)", "'+1", "'-1", "'@x", "'\t=1",
    ]  # fmt: skip
    assert [_cell(value) for value in (-1.5, 3, None, "lr=1", "a\nb")] == [-1.5, 3, None, "lr=1", "a b"]
    stream = io.StringIO()
    csv.writer(stream).writerow([_cell('="a",\r\n=1')])
    assert next(csv.reader(io.StringIO(stream.getvalue())))[0][0] == "'"


@pytest.mark.parametrize(
    "place", ["../evil", "..", "/evil", "0" * 32 + "/../x", "0" * 32 + "//etc", "", "a" * 31, "A" * 32]
)
def test_the_code_of_a_job_is_a_digest_and_a_folder_below_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "evil").mkdir()
    with pytest.raises(SnapshotError, match="its code is at"):
        open_code(RunFolder(str(tmp_path / "run")), place)


def test_printable_leaves_honest_text_alone() -> None:
    text = "Läufe → 3 steps/s 日本語 🚀\n\tnext"
    assert printable(text) == text
