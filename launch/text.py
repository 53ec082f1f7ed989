"""Numbers and tables as a person reads them; plain where there is no terminal, so that other programs can too."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def duration(seconds: float | None) -> str:
    """42 s, 3 min 20 s, 5 h 10 min, 2 d 4 h; nothing for what is not known."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    for size, unit, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def rate(steps_per_s: float | None) -> str:
    """Steps a second, or seconds a step where that is longer than one."""
    if not steps_per_s:
        return ""
    return f"{steps_per_s:.3g}/s" if steps_per_s >= 1 else f"{1 / steps_per_s:.3g} s/step"


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not sys.stdout.isatty():
        widths = [max(len(row[n]) for row in (columns, *rows)) for n in range(len(columns))]
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
