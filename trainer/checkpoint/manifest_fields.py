"""Check the type and range of every field of a manifest. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.checked_json import LATEST, mapping, number, sequence, shown, text, whole

MEASURED, PASSED_OVER = ("metric", "best"), "passed_over"
"""Fields of the progress that are not whole numbers."""
LONGEST_SIGNATURE = 512


def check_types(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of another type: only what a save can have written is restored."""
    for key in ("step", "attempt", "samples", "world"):
        whole(fields[key], f"its {key}")
    for key in ("parallel", "config_digest", "data_digest"):
        text(fields[key], f"its {key}")
    text(fields["signature"], "its signature", LONGEST_SIGNATURE)
    number(fields["time"], "its time", 0, LATEST)
    _check_metric(fields["metric"], "its metric")
    mapping(fields["values"], "its values")
    for key, value in mapping(fields["progress"], "its progress").items():
        if key in MEASURED:
            _check_metric(value, f"its progress.{shown(key)}")
        elif key == PASSED_OVER:
            for pair in sequence(value, f"its progress.{key}"):
                first, last = sequence(pair, f"its progress.{key}", 2) + [None] * (2 - len(pair))
                whole(first, f"its progress.{key}")
                whole(last, f"its progress.{key}")
        else:
            whole(value, f"its progress.{shown(key)}", -1)


def _check_metric(value: object, place: str) -> None:
    """Raise ValueError unless it is null or a number, which may be NaN or infinite."""
    if value is not None and type(value) is not float:
        number(value, place)
