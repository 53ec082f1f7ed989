"""Rows of the live table: one line a run, with a sparkline of its last values."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from everstep.launch import console
from everstep.launch.runs.history import History, read_all
from everstep.launch.runs.lookup import names
from everstep.launch.runs.state import RunState
from everstep.launch.runs.summary import summaries
from everstep.run_folder import RunFolder
from everstep.storage import join_url, open_storage

COLUMNS = ("run", "state", "step", "left", "metric", "values", "rate")
"""Columns by weight: on a terminal of 80 the last is reached by scrolling."""
WIDTHS = {"run": 20, "metric": 18}
"""Characters of long names; the page of a run has them whole."""
SPARKLINE = 8
"""Values in a sparkline."""
BLOCKS = "▁▂▃▄▅▆▇█"
GOING = (RunState.training.value, RunState.starting.value, RunState.restarting.value)


class RunTable:
    """The runs below one folder, read anew at each `refresh`."""

    def __init__(self, root: str) -> None:
        self.root = open_storage(root).url
        self.left_out = 0
        """Runs that could not be read in the last look."""
        self._seen: dict[str, deque[tuple[int, float]]] = {}

    def refresh(self) -> list[dict[str, Any]]:
        """Return the facts of all runs: those that go on first, then the newest."""
        folders = [RunFolder(join_url(self.root, name)) for name in names(self.root)]
        found = read_all(folders)
        histories = [each for each in found if isinstance(each, History)]
        now = time.time()
        facts = [each.facts(now) for each in summaries(histories)]
        self.left_out = len(folders) - len(histories)
        for each in facts:
            self._remember(each)
        return sorted(facts, key=lambda each: (each["state"] not in GOING, each["age_s"] or 0.0))

    def cells(self, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the cells of one row, in the order of COLUMNS."""
        going = facts["state"] in GOING
        step = "" if facts["step"] is None else f"{facts['step']}" + (f"/{facts['steps']}" if facts["steps"] else "")
        value = "" if facts["value"] is None else f"{facts['metric']} {console.number(facts['value'])}"
        return (
            _clipped(facts["run"], WIDTHS["run"]),
            facts["state"],
            step,
            console.duration(facts["eta_s"]) if going else "",
            _clipped(value, WIDTHS["metric"]),
            sparkline([value for _, value in self._seen.get(facts["url"], ())]),
            console.rate(facts["steps_per_s"]) if going else "",
        )

    def _remember(self, facts: Mapping[str, Any]) -> None:
        if facts["value"] is None or facts["step"] is None:
            return
        seen = self._seen.setdefault(facts["url"], deque(maxlen=SPARKLINE))
        if not seen or seen[-1][0] != facts["step"]:
            seen.append((facts["step"], float(facts["value"])))


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"


def sparkline(values: list[float]) -> str:
    """Return one block per value, the lowest as ▁ and the highest as █; empty for fewer than two values."""
    finite = [value for value in values if abs(value) != float("inf") and value == value]
    if len(finite) < 2:
        return ""
    low, spread = min(finite), max(finite) - min(finite)
    places = [int((value - low) / spread * (len(BLOCKS) - 1)) if spread else 0 for value in finite]
    return "".join(BLOCKS[place] for place in places)
