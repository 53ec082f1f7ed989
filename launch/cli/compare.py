"""`everstep compare RUN_A RUN_B`: print what differs between two runs, and what each has reached."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everstep.errors import printable
from everstep.launch.console import number
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_root, find
from everstep.launch.submit.comparison import compare as compare_facts
from everstep.launch.submit.comparison import readable

LONGEST = 60
"""Characters of a value that are shown."""


def compare(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 for any difference."""
    options = _parser().parse_args(arguments)
    folders = [find(run, options.root) for run in (options.a, options.b)]
    found = compare_facts(*map(readable, folders))
    if options.json:
        print(json.dumps({"runs": [folder.url for folder in folders], **found}, indent=1))
        return 0
    for line in _lines([options.a, options.b], found):
        print(printable(line))
    return 0


def _lines(names: Sequence[str], found: Mapping[str, Any]) -> Iterator[str]:
    for part in ("config", "data", "packages", "python"):
        if rows := found[part]:
            yield f"{part}: {names[0]} → {names[1]}"
            yield from (f"  {key}: {_short(a)} → {_short(b)}" for key, (a, b) in rows.items())
        elif part != "python":
            yield f"{part}: the same"
    yield from ["code:", *(f"  {line}" for line in found["code"])] if found["code"] else ["code: the same"]
    yield f"figures: {names[0]} → {names[1]}"
    yield from (f"  {name}: {_figure(a)} → {_figure(b)}" for name, (a, b) in found["figures"].items())


def _short(value: object) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else value
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _figure(value: float | None) -> str:
    return "(none)" if value is None else number(value)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep compare", description="What differs between two runs, and what each has reached.")
    parser.add_argument("a", metavar="RUN_A", help="a name, a path or a URL")
    parser.add_argument("b", metavar="RUN_B")
    add_root(parser)
    parser.add_argument("--json", action="store_true", help="an object, for scripts")
    return parser
