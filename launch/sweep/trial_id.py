"""Identity of a trial, a hash of its values and the base config; and its name, made of the values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

LONGEST = 100
"""Limit of a name's characters: a file name may have 255, and a path has several names."""


def identity(values: Mapping[str, Any], base_digest: str) -> str:
    """Return twelve hexadecimal digits, independent of the order of keys and of the other trials."""
    text = json.dumps([dict(values), base_digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def name(values: Mapping[str, Any], identity: str) -> str:
    """Return a name such as lr=0.001,depth=4-1a2b3c: the values, and a unique start of the identity."""
    told = ",".join(f"{short}={_word(values[key])}" for key, short in short_keys(list(values)).items())
    told = re.sub(r"[^A-Za-z0-9]*$", "", told[:LONGEST])
    return f"{told}-{identity[:6]}" if told else identity[:6]


def short_keys(keys: list[str]) -> dict[str, str]:
    """Shorten each key to its last part, or to as many parts as make it unique."""
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
