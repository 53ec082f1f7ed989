"""Medians with their spread, ratios within a round, and a Markdown table of them."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

Round = Mapping[str, float | None]
"""One figure of each contestant in one round; None where it could not be measured."""


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (lowest–highest)`."""
    if not values:
        return "–"
    low, middle, high = (f"{value:.{digits}g}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def figures(rounds: Sequence[Round], contestant: str) -> list[float]:
    return [value for one in rounds if (value := one.get(contestant)) is not None]


def ratios(rounds: Sequence[Round], contestant: str, base: str) -> list[float]:
    """A contestant's figure over `base`'s of the same round: what loads the machine then loads both."""
    pairs = [(one.get(contestant), one.get(base)) for one in rounds]
    return [value / unit for value, unit in pairs if value is not None and unit is not None]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """What the figures were taken on, in a line."""
    cpus = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    load = ((_lines("/proc/loadavg") or ["?"])[0]).split()[0]
    model = cpus[0] if cpus else platform.processor()
    return f"{len(cpus)} × {model}, load {load}, Python {platform.python_version()}, torch {version('torch')}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
