"""HTML page of a report: one file that asks for nothing from elsewhere and runs only its own scripts."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from everstep.launch.console import duration, number
from everstep.launch.report.text import json_in_html

HERE = files("everstep.launch.report")
DRAWN = ("curves", "timeline", "nodes")
"""Parts of the facts that are long lists of numbers; the page has them compressed."""


def page(facts: Mapping[str, Any], template: str) -> str:
    """Return the page of cleaned facts.

    Args:
        template: file in templates/.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(lambda name: _text(f"templates/{name}")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "number": number, "when": when, "size": size, "cell": cell}
    # Files of this package, and base64 of what the scripts read: the only texts that are not escaped.
    style, script, library = _text("style.css"), _text("charts.js"), _text("vendor/echarts.min.js")
    return environment.get_template(template).render(
        facts=facts,
        policy=_policy(style, script, library),
        style=Markup(style),
        script=Markup(script),
        library=Markup(_packed(library)),
        drawn=Markup(_packed(json_in_html({key: facts[key] for key in DRAWN if key in facts}))),
        json=Markup(json_in_html({key: value for key, value in facts.items() if key not in DRAWN})),
    )


def _text(name: str) -> str:
    return HERE.joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, *scripts: str) -> str:
    """Return the content security policy: no request, and only these very styles and scripts."""
    allowed = " ".join(_digest(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def when(seconds: float | None) -> str:
    """Format a time since the epoch in UTC."""
    from datetime import UTC, datetime

    return "" if not seconds else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def size(count: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def cell(value: object) -> str:
    """Format a value of a config or a figure for a table."""
    import json

    return value if isinstance(value, str) else number(value) if isinstance(value, float) else json.dumps(value)
