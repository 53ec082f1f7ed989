"""What stands on the terminal: lines for logs, a bar that fits 80 columns, and numbers that are short."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from everstep.config import LogConfig, Progress
from everstep.trainer.reporting import console
from everstep.trainer.reporting.console import Bar, Display, Lines, Quiet, columns, open_display, short

WIDEST = {
    "kind": "train", "step": 123456, "loss": 12.34567, "lr": 1.234e-4, "norm": 1.0, "unit": "tokens",
    "items_per_s": 1_234_567.0, "mfu": 0.4567, "memory_mb": 77_777.0, "data_wait": 0.1234,
}  # fmt: skip
LEAST = {"kind": "train", "step": 1, "loss": 0.5, "lr": 0.1}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (0.12345, "0.123"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (64000, "64k"),
        (999_499, "999k"), (999_999, "1M"), (1_234_567, "1.23M"), (7.1e9, "7.1G"), (2.5e12, "2.5T"), (-1500, "-1.5k"),
        (3e15, "3e+03T"),
    ],
)  # fmt: skip
def test_numbers_are_three_digits_and_a_letter(number: float, text: str) -> None:
    assert short(number) == text


def test_a_record_shows_what_it_has_and_waiting_only_when_there_is_some() -> None:
    assert columns(LEAST) == {"loss": "0.5000", "lr": "1.00e-01"}
    assert columns({**LEAST, "data_wait": 0.001}).get("wait") is None
    shown = columns(WIDEST)
    assert shown["tokens/s"] == "1.23M"
    assert shown["mfu"] == "46%"
    assert shown["mem"] == "76.0G"
    assert shown["wait"] == "12%"


def test_what_a_terminal_would_obey_is_shown_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    said = "a\x1b[31mb\x07\r\x9b2J\u202ec\td\n«é» 🎉 می\u200cخواهم"
    Lines(0).say(said)
    assert capsys.readouterr().out == "a\\x1b[31mb\\x07\\r\\x9b2J\\u202ec\td\n«é» 🎉 می\u200cخواهم\n"
    bar = Bar()
    bar.bar.console.file = stream = io.StringIO()
    bar.say(said)
    assert "\x1b" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


def test_nan_and_infinity_are_shown_as_they_are() -> None:
    assert columns({**LEAST, "loss": float("nan"), "lr": float("inf")}) == {"loss": "nan", "lr": "inf"}


@pytest.mark.parametrize(
    ("progress", "main", "terminal", "kind"),
    [
        (Progress.auto, True, True, Bar), (Progress.auto, True, False, Lines), (Progress.bar, True, False, Bar),
        (Progress.lines, True, True, Lines), (Progress.off, True, True, Quiet), (Progress.bar, False, True, Quiet),
    ],
)  # fmt: skip
def test_a_bar_is_for_terminals_and_only_the_first_rank_shows(
    monkeypatch: pytest.MonkeyPatch, progress: Progress, main: bool, terminal: bool, kind: type[Display]
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    assert type(open_display(LogConfig(progress=progress), main)) is kind


def test_lines_come_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 100.0, 103.0, 110.5, 110.5, 111.0, 111.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    lines = Lines(10.0)
    lines.start("demo, attempt 1", {"parameters": "1.2M", "folder": "runs/[demo]"}, 0, 30)
    for step in (1, 2, 3, 30):
        lines.update(step, LEAST)
    lines.say("held-out at step 30: loss 0.5")
    lines.close()
    assert capsys.readouterr().out.splitlines() == [
        "demo, attempt 1",
        "  parameters   1.2M",
        "  folder       runs/[demo]",
        "step 1/30  loss 0.5000  lr 1.00e-01",
        "step 3/30  loss 0.5000  lr 1.00e-01",
        "step 30/30  loss 0.5000  lr 1.00e-01",
        "held-out at step 30: loss 0.5",
    ]


def bar() -> tuple[Bar, io.StringIO]:
    shown, out = Bar(), io.StringIO()
    shown.console = shown.bar.live.console = Console(width=80, file=out, highlight=False)
    return shown, out


@pytest.mark.parametrize(
    ("record", "steps", "seen"),
    [
        (LEAST, 10, ["step", " 1/10", "loss 0.5000 · lr 1.00e-01", "-:--"]),
        ({**WIDEST, "step": 250}, 600, ["step", "250/600", "loss 12.3457 · lr 1.23e-04 · tokens/s 1.23M", "-:--"]),
        (WIDEST, 1_000_000, ["step", " 123456/1000000", "loss 12.3457 · lr 1.23e-04", "-:--"]),
    ],
)
def test_the_bar_is_one_line_of_80_columns_and_leaves_out_what_does_not_fit(
    record: dict[str, Any], steps: int, seen: list[str]
) -> None:
    shown, _ = bar()
    shown.start("demo", {"world": "1 × cpu"}, 0, steps)
    shown.update(record["step"], record)
    out = io.StringIO()
    Console(width=80, file=out).print(shown.bar.get_renderable())
    shown.close()
    text = out.getvalue().rstrip("\n")
    assert "\n" not in text
    assert len(text) <= 80
    assert "…" not in text
    assert "━" in text
    for words in seen:
        assert words in text, text


def test_a_wide_terminal_shows_all_columns() -> None:
    shown, _ = bar()
    shown.start("demo", {}, 0, 1000)
    shown.console = Console(width=140)
    shown.update(10, WIDEST)
    shown.close()
    assert "wait" in shown.bar.tasks[0].fields["info"]


def test_the_table_at_the_start_fits_80_columns_and_takes_brackets_as_they_are() -> None:
    shown, out = bar()
    shown.start("demo, attempt 1", {"folder": "/data/[/b]/runs", "data": "1.5k samples, 3 epochs"}, 0, 10)
    shown.say("walked past: [/red] and x[1:][/i]")
    shown.close()
    text = out.getvalue()
    assert "/data/[/b]/runs" in text
    assert "walked past: [/red] and x[1:][/i]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_quiet_display_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    quiet.start("t", {"a": "b"}, 0, 1)
    quiet.update(1, LEAST)
    quiet.say("x")
    quiet.close()
    assert capsys.readouterr().out == ""
