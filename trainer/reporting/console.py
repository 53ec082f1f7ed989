"""Display on rank 0's terminal: a table at the start, then a bar; plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from everstep.config import LogConfig, Progress
from everstep.errors import printable

SHORTEST_BAR = 4


class Display(Protocol):
    """Shows the progress of training."""

    def start(self, title: str, facts: Mapping[str, str], step: int, steps: int) -> None: ...
    def update(self, step: int, record: Mapping[str, Any]) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


def open_display(log: LogConfig, main: bool) -> Display:
    """Return the configured display; `auto` is a bar on a terminal, else lines. Only rank 0 shows one."""
    if not main or log.progress is Progress.off or sys.stdout is None:
        return Quiet()
    if log.progress is Progress.bar or (log.progress is Progress.auto and sys.stdout.isatty()):
        return Bar()
    return Lines(log.line_every_s)


class Quiet:
    """Shows nothing."""

    def start(self, title: str, facts: Mapping[str, str], step: int, steps: int) -> None: ...
    def update(self, step: int, record: Mapping[str, Any]) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """One line every few seconds, for logs."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._shown = float("-inf")
        self._steps = 0

    def start(self, title: str, facts: Mapping[str, str], step: int, steps: int) -> None:
        self._steps = steps
        self.say(title)
        for name, value in facts.items():
            self.say(f"  {name:<12} {value}")

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        if time.monotonic() - self._shown < self.every_s and step < self._steps:
            return
        self._shown = time.monotonic()
        self.say(f"step {step}/{self._steps}  " + "  ".join(f"{k} {v}" for k, v in columns(record).items()))

    def say(self, line: str) -> None:
        print(printable(line), flush=True)

    def close(self) -> None: ...


class Bar:
    """rich's progress bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        def whole() -> Column:
            return Column(no_wrap=True, overflow="ignore")

        self.console = Console(highlight=False)
        self.bar = RichProgress(
            TextColumn("step [bold]{task.completed}[/]/{task.total}", table_column=whole()),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=SHORTEST_BAR)),
            TextColumn("{task.fields[info]}", table_column=whole()),
            TimeRemainingColumn(compact=True, table_column=whole()),
            console=self.console,
            expand=True,
        )

    def start(self, title: str, facts: Mapping[str, str], step: int, steps: int) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            table.add_row(f"[dim]{name}", Text(value))
        self.console.print(table)
        self.task = self.bar.add_task("train", total=steps, completed=step, info="starting …")
        self.bar.start()

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        self.bar.update(self.task, completed=step, info=self._fitting(columns(record)))

    def _fitting(self, shown: Mapping[str, str]) -> str:
        """Return the leading columns that fit beside the steps, a piece of the bar and the time left."""
        total = len(f"{self.bar.tasks[self.task].total:.0f}")
        room, texts = self.console.width - len("step /  ") - 2 * total - len("  00:00:00") - SHORTEST_BAR, []
        for name, value in shown.items():
            room -= len(f"{name} {value} · ")
            if room + len(" · ") < 0:
                break
            texts.append(f"{name} [bold]{value}[/]")
        return " · ".join(texts)

    def say(self, line: str) -> None:
        # Not markup: a line may contain brackets, as a model's sample of Python does.
        self.bar.console.print(printable(line), markup=False)

    def close(self) -> None:
        self.bar.stop()


def columns(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a training record in short texts that fit a line of 80 columns."""
    shown = {"loss": f"{record['loss']:.4f}", "lr": f"{record['lr']:.2e}"}
    if "items_per_s" in record:
        shown[f"{record.get('unit', 'items')}/s"] = short(record["items_per_s"])
    if "mfu" in record:
        shown["mfu"] = f"{record['mfu']:.0%}"
    if "memory_mb" in record:
        shown["mem"] = f"{record['memory_mb'] / 1024:.1f}G"
    if record.get("data_wait", 0) >= 0.01:
        shown["wait"] = f"{record['data_wait']:.0%}"
    return shown


def short(number: float) -> str:
    """Format a number with a unit: 1234567 as 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # numbers that round up to the unit at three digits
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
