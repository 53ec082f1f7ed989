"""Facts of a run folder made safe to show: no secrets, no control characters, no NaN in JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from typing import Any

from everstep.errors import printable
from everstep.security.secret_detection import without_secrets

LONGEST = 10_000
"""Characters of one text of a run folder that a report has."""
IN_HTML = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def clean(value: Any) -> Any:
    """Return facts as JSON values: dataclasses as objects, texts without secrets, NaN and Inf as null."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) or value is None:
        return value
    if isinstance(value, enum.Enum):
        return clean(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: clean(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {clean_text(str(key)): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    return clean_text(str(value))


def clean_text(text: str) -> str:
    """Return a text without secrets and control characters, cut to LONGEST characters."""
    text = text.encode(errors="replace").decode()
    left_out = f" … ({len(text) - LONGEST:,} more characters)" if len(text) > LONGEST else ""
    # Secrets first: a cut could leave half of one, which no form recognizes.
    return printable(without_secrets(text)[:LONGEST]) + left_out


def json_in_html(value: Any) -> str:
    """Return cleaned facts as JSON that no HTML parser can take for the end of its script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(IN_HTML)
