"""Lines, numbers and tables for the user; plain without a terminal, for other programs."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence

from everstep.errors import printable

GAP = 2
"""Blanks after each cell of a table."""


def duration(seconds: float | None) -> str:
    """Format as 42 s, 3 min 20 s, 5 h 10 min or 2 d 4 h; empty for an unknown duration."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    for size, unit, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def rate(steps_per_s: float | None) -> str:
    """Format as steps per second, or as seconds per step when a step takes longer than one second."""
    if not steps_per_s:
        return ""
    return f"{steps_per_s:.3g}/s" if steps_per_s >= 1 else f"{1 / steps_per_s:.3g} s/step"


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> None:
    """Print a table: all columns as plain lines without a terminal, else as many columns as fit its width.

    Args:
        spare: columns to leave out, in this order, until the others fit.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in (columns, *rows)) for n in range(len(columns))]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    kept = _fitting(columns, widths, spare, console.width)
    table = Table(*(columns[n] for n in kept), box=None, header_style="dim", padding=(0, GAP, 0, 0))
    for row in rows:
        table.add_row(*(Text(row[n]) for n in kept))
    console.print(table)
    if left_out := [name for name in columns if columns.index(name) not in kept]:
        console.print(f"a wider terminal has room for: {', '.join(left_out)}", style="dim")


def _fitting(columns: Sequence[str], widths: Sequence[int], spare: Sequence[str], room: int) -> list[int]:
    """Return the indices of the columns to print."""
    kept = list(range(len(columns)))
    for name in spare:
        if sum(widths[n] + GAP for n in kept) <= room:
            break
        kept.remove(columns.index(name))
    return kept


COLOR = re.compile(rb"\x1b\[[0-9;]*m|[\t\n\r]")
CONTROL = re.compile(rb"\x1b\[[0-9;]*m|[\x00-\x1f\x7f]|\xc2[\x80-\x9f]")


def escape_control_sequences(data: bytes) -> bytes:
    """Return the bytes with control sequences as text, except colors: they can set title and clipboard."""
    return CONTROL.sub(lambda found: found[0] if COLOR.fullmatch(found[0]) else b"\\x" + found[0].hex().encode(), data)


def say(line: str) -> None:
    """Print one line on stderr. A closed terminal must not keep the run from an orderly end."""
    with contextlib.suppress(OSError):
        print(printable(f"everstep: {line}"), file=sys.stderr, flush=True)
