"""Leaderboard: the trials of a sweep, best first."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.config import Goal
from everstep.errors import ConfigError, printable
from everstep.launch import console as text_tables
from everstep.launch.sweep.plan import Plan
from everstep.launch.sweep.search_space import short_keys
from everstep.launch.sweep.state import SweepState, Trial, evaluations, loss


@dataclass(frozen=True)
class Row:
    """One row of the leaderboard."""

    trial: Trial
    state: str
    values: tuple[float, ...]
    step: int
    is_best: bool
    """True for the best trial; with several metrics, for each trial of the Pareto set."""
    goodput: float | None = None


def ranked(plan: Plan, story: SweepState) -> list[Row]:
    """Return rows, best first: by the rung reached, then by the metrics; trials without a result last."""
    shown = [trial for trial in story.trials if _values(trial)]
    rest = [trial for trial in story.trials if not _values(trial)]
    front = _front(shown, plan.goals, plan.rung_count)

    def key(trial: Trial) -> tuple[Any, ...]:
        losses = tuple(loss(value, goal) for value, goal in zip(_values(trial), plan.goals, strict=True))
        return (trial.number not in front, -_reached(trial), losses, trial.number)

    return [
        Row(trial, state(trial, plan.rung_count), _values(trial), _step(trial), trial.number in front)
        for trial in [*sorted(shown, key=key), *rest]
    ]


def _front(trials: Sequence[Trial], goals: Sequence[Goal], count: int) -> set[int]:
    """Return the best trial; with several metrics, the Pareto set."""
    points = {
        trial.number: tuple(loss(value, goal) for value, goal in zip(_values(trial), goals, strict=True))
        for trial in trials
        if not all(math.isnan(value) for value in _values(trial))
    }
    if len(goals) == 1:
        reached = {trial.number: -_reached(trial) for trial in trials}
        return set(sorted(points, key=lambda number: (reached[number], points[number], number))[:1])
    return {
        number
        for number, point in points.items()
        if not any(_beats(other, point) for at, other in points.items() if at != number)
    }


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def state(trial: Trial, count: int) -> str:
    """Return the trial's state; with rungs, the rung that an unpromoted trial has reached."""
    last = trial.last
    if trial.is_open or last is None:
        return "open"
    if last.verdict.is_final or trial.rung == count - 1:
        return last.verdict.value
    return f"rung {trial.rung + 1} of {count}"


def _values(trial: Trial) -> tuple[float, ...]:
    return next((told.values for _, told in sorted(trial.told.items(), reverse=True) if told.values), ())


def _reached(trial: Trial) -> int:
    """Return the highest rung with a result that was not pruned; -1 for none."""
    return max((rung for rung, told in trial.told.items() if told.values and told.verdict.value == "done"), default=-1)


def _step(trial: Trial) -> int:
    return max((told.step for told in trial.told.values()), default=0)


def facts(plan: Plan, row: Row) -> dict[str, Any]:
    """Return a row as JSON-compatible values; NaN becomes null."""
    told = row.trial.last
    values = dict(zip(plan.metrics, row.values, strict=False))
    return {
        "trial": row.trial.number,
        "name": row.trial.name,
        "identity": row.trial.identity,
        "state": row.state,
        "best": row.is_best,
        **{name: None if math.isnan(value) else value for name, value in values.items()},
        "steps": row.step,
        "goodput": None if row.goodput is None else round(row.goodput, 4),
        "values": row.trial.values,
        "reason": told.reason if told is not None else "",
        "url": plan.folder.run(row.trial.name).url,
    }


def by_metric(plan: Plan, rows: Sequence[Row], metric: str, goal: Goal) -> list[Row]:
    """Rank the trials by another metric that they have measured. ConfigError when no trial has."""
    found: dict[int, float] = {}
    measured: set[str] = set()
    for row in rows:
        for record in evaluations(plan.folder.run(row.trial.name)).values():
            measured |= record.keys() - {"kind", "step", "time"}
            if metric in record:
                found[row.trial.number] = float(record[metric])
    if not found:
        there = ", ".join(sorted(measured)) or "none yet"
        raise ConfigError(f"--metric {metric}: no trial has measured it; there are {there}")
    order = sorted(found, key=lambda number: (loss(found[number], goal), number))
    known = {row.trial.number: row for row in rows}
    first = [Row(known[n].trial, known[n].state, (found[n],), known[n].step, n == order[0]) for n in order]
    return first + [Row(row.trial, row.state, (), row.step, False) for row in rows if row.trial.number not in found]


def print_rows(plan: Plan, rows: Sequence[Row], names: Sequence[str]) -> None:
    keys = short_keys(list(dict.fromkeys(key for row in rows for key in row.trial.values)))
    known = any(row.goodput is not None for row in rows)
    columns = ("", *names, *keys.values(), "state", "steps", *(["goodput"] if known else []), "trial")
    text_tables.print_table(
        columns,
        [
            [
                "*" if row.is_best else "",
                *(text_tables.number(value) for value in row.values or ("",) * len(names)),
                *(text_tables.number(row.trial.values.get(key, "")) for key in keys),
                row.state,
                str(row.step or ""),
                *(["" if row.goodput is None else f"{row.goodput:.0%}"] if known else []),
                row.trial.name,
            ]
            for row in rows
        ],
    )
    spent = sum(row.step for row in rows)
    print(printable(f"{len(rows)} trials, {spent:,} steps in all"))


def write_csv(plan: Plan, rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row.trial.values))
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(_cell, ["trial", "name", "state", "best", *names, "steps", "goodput", *keys]))
        for row in rows:
            told = facts(plan, row) | named_values(names, row)
            writer.writerow(
                _cell(value)
                for value in [
                    told["trial"],
                    told["name"],
                    told["state"],
                    told["best"],
                    *(told.get(n) for n in names),
                    told["steps"],
                    told["goodput"],
                    *(row.trial.values.get(key) for key in keys),
                ]
            )


def _cell(value: Any) -> Any:
    """Return a value that a spreadsheet does not take for a formula, such as =HYPERLINK(…)."""
    if not isinstance(value, str):
        return value
    text = printable(value).replace("\n", " ")
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def named_values(names: Sequence[str], row: Row) -> dict[str, Any]:
    pairs = zip(names, row.values, strict=False)
    return {name: None if math.isnan(value) else value for name, value in pairs}
