"""Tables of an evaluation's result, for a terminal. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from everstep.errors import printable


def show(record: Mapping[str, Any], url: str) -> None:
    """Print the result; the record is in `url`."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 240)
    print(printable(f"{record['checkpoint']}, weights: {record['weights']}"))
    for name, facts in record["sets"].items():
        against = record.get("against", {}).get("sets", {}).get(name)
        print(printable(f"\n{name}: {facts['samples']} samples{_left_out(facts)}"))
        console.print(_metrics(facts, against))
        if "slices" in facts:
            console.print(_slices(facts))
    if "against" in record:
        print(printable(f"\ncompared with {record['against']['checkpoint']} on the same samples"))
    print(printable(f"\nwritten to {url}"))


def _left_out(facts: Mapping[str, Any]) -> str:
    return f", {facts['left_out']} left out (excluded, or cannot be decoded)" if "left_out" in facts else ""


def _metrics(facts: Mapping[str, Any], against: Mapping[str, Any] | None) -> Any:
    from rich.markup import escape
    from rich.table import Table

    columns = ["metric", "value", "95 % interval"]
    table = Table(
        *columns, *(["other", "difference", "95 % interval"] if against else []), box=None, header_style="dim"
    )
    for name, found in facts["metrics"].items():
        cells = [escape(printable(name)), _number(found["value"]), _interval(found)]
        if against:
            other, difference = against["metrics"].get(name), against["differences"].get(name)
            cells.append(_number(other["value"]) if other else "")
            cells += [f"{difference['value']:+.5g}", _interval(difference)] if difference else ["", ""]
        table.add_row(*cells)
    return table


def _slices(facts: Mapping[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    names = list(facts["metrics"])
    headers = [escape(printable(header)) for header in (facts["by"], "samples", *names)]
    table = Table(*headers, box=None, header_style="dim")
    for label, part in facts["slices"].items():
        values = [part["metrics"].get(name, {}).get("value") for name in names]
        cells = ["" if value is None else _number(value) for value in values]
        table.add_row(escape(printable(label)), str(part["samples"]), *cells)
    return table


def _number(value: float) -> str:
    return f"{value:.5g}"


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['low']:.5g} … {found['high']:.5g}" if "low" in found else "–"
