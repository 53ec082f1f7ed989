"""`everstep top`: the live table of runs, at 80 columns and 24 lines."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import ConfigError
from everstep.launch.cli.top import top
from everstep.launch.top import app as application
from everstep.launch.top.table import COLUMNS, RunTable, sparkline
from support import TESTS

pytest.importorskip("textual")
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import DataTable, Sparkline, Static

RECORDED = TESTS / "recorded/run-killed-twice"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(RECORDED, tmp_path / "runs/first")
    shutil.copytree(RECORDED, tmp_path / "runs/second")
    return tmp_path / "runs"


def play(root: Path, act: Callable[[Pilot[None]], Awaitable[None]]) -> application.TopApp:
    shown = application.TopApp(str(root), 60.0)

    async def go() -> None:
        async with shown.run_test(size=(80, 24)) as pilot:
            await settled(pilot, lambda: bool(shown.facts))
            await act(pilot)

    asyncio.run(go())
    return shown


async def settled(pilot: Pilot[None], reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await pilot.pause(0.01)


def text(pilot: Pilot[None], name: str) -> str:
    return str(pilot.app.screen.query_one(name, Static).content)


def test_all_runs_are_rows_that_fit_into_80_columns(root: Path) -> None:
    shutil.move(root / "second", root / "digits-lr-0.003-20261130-200043")

    async def act(pilot: Pilot[None]) -> None:
        table: DataTable[Text] = pilot.app.query_one(DataTable)
        names = {str(table.get_row_at(row)[0]).strip() for row in range(table.row_count)}
        assert names == {"first", "digits-lr…130-200043"}
        assert str(table.get_row_at(0)[COLUMNS.index("state")]).strip() == "done"
        assert sum(column.get_render_width(table) for column in table.ordered_columns[:-1]) <= 80

    play(root, act)


def test_enter_opens_a_run_with_its_status_and_curve_and_escape_goes_back(root: Path) -> None:
    async def act(pilot: Pilot[None]) -> None:
        await pilot.press("enter")
        await settled(pilot, lambda: bool(pilot.app.screen.query("#status")) and "state" in text(pilot, "#status"))
        assert "done" in text(pilot, "#status")
        assert "restarts" in text(pilot, "#status")
        assert len(pilot.app.screen.query_one(Sparkline).data or []) > 20
        await pilot.press("escape")
        assert pilot.app.query(DataTable)

    play(root, act)


@pytest.mark.parametrize(("key", "verb"), [("c", "cancel_run"), ("r", "resume")])
@pytest.mark.parametrize(("answer", "done"), [("y", True), ("n", False)])
def test_cancel_and_resume_ask_first(
    root: Path, monkeypatch: pytest.MonkeyPatch, key: str, verb: str, answer: str, done: bool
) -> None:
    called: list[str] = []

    def note(folder: Any) -> str:
        called.append(folder.url)
        return "noted"

    monkeypatch.setattr(application, verb, note)

    async def act(pilot: Pilot[None]) -> None:
        await pilot.press(key)
        await settled(pilot, lambda: isinstance(pilot.app.screen, application.Confirm))
        assert called == []
        await pilot.press(answer)
        await settled(pilot, lambda: not isinstance(pilot.app.screen, application.Confirm))
        if done:
            await settled(pilot, lambda: "noted" in text(pilot, "#said"))

    play(root, act)
    assert bool(called) == done


def test_a_folder_that_is_no_run_is_counted_and_a_hostile_name_is_shown_as_text(root: Path) -> None:
    shutil.move(root / "second", root / "[bold red]x\x1b[2J")
    (root / "broken").mkdir()
    (root / "broken/config.yaml").write_text("a: [")
    (root / "broken/job.yaml").write_text("a: [")

    async def act(pilot: Pilot[None]) -> None:
        table: DataTable[Text] = pilot.app.query_one(DataTable)
        names = {str(table.get_row_at(row)[0]) for row in range(table.row_count)}
        assert any(name.startswith("[bold red]x") and "\x1b" not in name for name in names)
        assert all(isinstance(table.get_row_at(row)[0], Text) for row in range(table.row_count))  # no markup

    play(root, act)


def test_the_table_keeps_the_last_values_of_each_run_for_its_sparkline(root: Path) -> None:
    table = RunTable(str(root))
    (facts, _) = table.refresh()
    for step in range(20):
        table._remember({**facts, "step": step, "value": float(step)})
    assert table.cells(facts)[COLUMNS.index("values")] == "▁▂▃▄▅▆▇█"


def test_sparklines_leave_out_what_is_not_finite() -> None:
    assert sparkline([1.0, float("nan"), 2.0, float("inf")]) == "▁█"
    assert sparkline([1.0]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere holds no run; 'everstep top ROOT' looks elsewhere"),
        (["--every", "0.1"], "--every 0.1: a look at all runs takes a moment (at least 0.5 s)"),
        (["{root}"], "everstep top needs a terminal; 'everstep ls --json' is for scripts"),
    ],
)
def test_what_cannot_be_shown_is_one_line(root: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        top([word.format(root=root) for word in words])
    assert str(error.value).endswith(said)
