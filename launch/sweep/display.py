"""Live display of a sweep: a table on a terminal; without one, a line for each new result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from everstep.launch import console as text_tables
from everstep.launch.console import say
from everstep.launch.sweep.leaderboard import Row, ranked, state
from everstep.launch.sweep.plan import Plan
from everstep.launch.sweep.state import SweepState
from everstep.launch.sweep.workers import Task

if TYPE_CHECKING:
    from rich.table import Table

BEST = 8
"""Trials that the table shows."""
Show = Callable[[SweepState, list[Task]], None]


@contextlib.contextmanager
def shower(plan: Plan) -> Iterator[Show]:
    """Yield the callable that the driver calls in each round."""
    if not sys.stdout.isatty():
        yield Lines(plan)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False) as live:

        def show(story: SweepState, running: list[Task]) -> None:
            live.update(_table(plan, story, running))
            live.refresh()

        yield show


class Lines:
    """Print a line for each new result."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.told: int | None = None
        """Results printed so far. Results from before this driver are not printed again."""

    def __call__(self, story: SweepState, running: list[Task]) -> None:
        results = [(trial, told) for trial, told in story.order if told is not None]
        first = len(results) if self.told is None else self.told
        for trial, told in results[first:]:
            shown = ", ".join(
                f"{name} {text_tables.number(value)}"
                for name, value in zip(self.plan.metrics, told.values, strict=False)
            )
            why = f" ({told.reason})" if told.reason else ""
            say(f"{trial.name}: {told.verdict.value} at step {told.step}{f', {shown}' if shown else ''}{why}")
        self.told = len(results)


def _table(plan: Plan, story: SweepState, running: list[Task]) -> Table:
    from rich.table import Table

    table = Table(
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
        caption=summary(plan, story, running),
        caption_justify="left",
    )
    for column in ("", *plan.metrics, "state", "steps", "trial"):
        table.add_column(column)
    shown = [row for row in ranked(plan, story) if row.values][:BEST]
    for row in shown:
        table.add_row(*_cells(row))
    for task in running:
        table.add_row("", *("" for _ in plan.metrics), "running", "", str(task.config.run))
    return table


def _cells(row: Row) -> list[str]:
    best = "*" if row.is_best else ""
    return [best, *(text_tables.number(value) for value in row.values), row.state, str(row.step), row.trial.name]


def summary(plan: Plan, story: SweepState, running: list[Task]) -> str:
    """Return one line that counts the trials by state."""
    counts: dict[str, int] = {}
    busy = {task.trial for task in running}
    for trial in story.trials:
        word = "running" if trial.number in busy else state(trial, plan.rung_count)
        counts[word] = counts.get(word, 0) + 1
    total = "" if plan.sweep.trials is None else f" of {plan.sweep.trials}"
    return f"{len(story.trials)}{total} trials: " + ", ".join(f"{count} {word}" for word, count in counts.items())
