"""Who a trial is: a hash of what it changes and of what it changes it in; and a name that says the former."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

LONGEST = 100
"""Characters of a name; a folder's may have 255, and a path is more than one name."""


def identity(values: Mapping[str, Any], base_digest: str) -> str:
    """Twelve characters. The order of keys plays no part, nor does what else is in the sweep."""
    text = json.dumps([dict(values), base_digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def name(values: Mapping[str, Any], identity: str) -> str:
    """lr=0.001,depth=4-1a2b3c: what differs, and enough of the identity to be unique."""
    told = ",".join(f"{short}={_word(values[key])}" for key, short in short_keys(list(values)).items())
    told = re.sub(r"[^A-Za-z0-9]*$", "", told[:LONGEST])
    return f"{told}-{identity[:6]}" if told else identity[:6]


def short_keys(keys: list[str]) -> dict[str, str]:
    """Each key by its last part, or by as many parts as tell it from the others."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-count:])
            if sum(other == short[key] or other.endswith(f".{short[key]}") for other in keys) == 1:
                break
    return short


def _word(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("+", "")).strip("_")
