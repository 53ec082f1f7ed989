"""Suggestion of the next trial: values from the sampler that pass the constraint and are new."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from everstep.errors import ConfigError
from everstep.launch.sweep import search_space as trial_id
from everstep.launch.sweep.asha import first_rung
from everstep.launch.sweep.config import PURE
from everstep.launch.sweep.plan import Plan
from everstep.launch.sweep.samplers import Study, draws
from everstep.launch.sweep.state import RungResult, SweepState, Trial

TRIES = 1000
"""Consecutive rejected suggestions after which the search space counts as exhausted."""


class Suggester:
    """Source of new trials: `next` returns the record of the next one."""

    def __init__(self, plan: Plan, story: SweepState) -> None:
        self.plan = plan
        self.constraint = plan.constraint()
        self.study: Study | None = None
        self._draws: Iterator[dict[str, Any]] = iter(())
        if plan.sweep.sampler in PURE:
            self._draws = draws(plan.sweep.sampler, plan.axes, plan.sweep.seed)
        else:
            self.study = Study(plan.sweep, plan.axes, plan.goals)
            self.study.replay(story)

    def next(self, story: SweepState) -> tuple[dict[str, Any], int | None] | None:
        """Return the record of the next trial and its number in the study; None when nothing is left to try."""
        limit = self.plan.sweep.trials
        if limit is not None and len(story.trials) >= limit:
            return None
        for attempt in range(TRIES + len(story.trials)):
            found = self._draw(len(story.trials), attempt)
            if found is None:
                return None
            drawn, attributes, number = found
            values = self._allowed(drawn)
            if values is not None and self.plan.identity(values) not in story.identities:
                return self._record(values, drawn, attributes, len(story.trials)), number
            if self.study is not None and number is not None:
                self.study.reject(number)
        return None

    def know(self, asked: Trial, number: int | None) -> None:
        if self.study is not None and number is not None:
            self.study.know(asked, number)

    def tell(self, asked: Trial, told: RungResult) -> None:
        if self.study is not None:
            self.study.tell(asked, told)

    def _draw(self, number: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any], int | None] | None:
        if self.study is not None:
            return self.study.ask(number, attempt)
        drawn = next(self._draws, None)
        return None if drawn is None else (drawn, {}, None)

    def _allowed(self, drawn: dict[str, Any]) -> dict[str, Any] | None:
        """Return the values after the constraint; None for a trial that the user's function leaves out."""
        values = self.constraint(dict(drawn))
        if values is None or isinstance(values, dict):
            return values
        raise ConfigError(
            f"sweep.constraint={self.plan.sweep.constraint} returned {values!r}; return the values, or None"
        )

    def _record(
        self, values: dict[str, Any], drawn: dict[str, Any], attributes: dict[str, Any], number: int
    ) -> dict[str, Any]:
        identity = self.plan.identity(values)
        return {
            "event": "asked",
            "identity": identity,
            "name": trial_id.name(values, identity),
            "values": values,
            "drawn": drawn,
            "attributes": attributes,
            "rung": first_rung(self.plan.sweep, self.plan.rung_count, number),
        }
