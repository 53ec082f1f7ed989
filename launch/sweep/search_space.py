"""Search space: one axis for each override that names several values; identity of a trial."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One key and its values: a list, or an interval to draw from."""

    key: str
    text: str
    """The original override."""
    choices: tuple[Any, ...] = ()
    low: float | None = None
    """None when the axis is a list."""
    high: float | None = None
    log: bool = False
    whole: bool = False
    """True for an interval of whole numbers, both ends included."""
    is_group: bool = False
    """True when the values are options of a config group."""

    @property
    def is_interval(self) -> bool:
        return self.low is not None

    def at(self, fraction: float) -> Any:
        """Map a fraction in [0, 1), random or quasi-random, to a value of the axis."""
        if self.low is None or self.high is None:
            return self.choices[int(fraction * len(self.choices))]
        low, high = float(self.low), float(self.high)
        if self.whole:
            low, high = low - 0.5 if self.log else low, high + 0.5 if self.log else high + 1
        value = low * (high / low) ** fraction if self.log else low + (high - low) * fraction
        if not self.whole:
            return value
        return max(int(self.low), min(int(self.high), round(value) if self.log else int(value)))


def is_sweep(text: str) -> bool:
    """True if an override names several values. ConfigError when it cannot be parsed."""
    return bool(_parsed(text).is_sweep_override())


def axis(text: str, groups: Mapping[str, Sequence[str]], seed: int) -> Axis:
    """Parse an override such as `optimizer.lr=tag(log,interval(1e-5,1e-2))` into an axis.

    Args:
        groups: config groups with their options.
        seed: of `shuffle`, so that the order is reproducible.
    """
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    override = _parsed(text)
    key, value, group = override.key_or_group, override.value(), override.key_or_group in groups
    if isinstance(value, IntervalSweep):
        return _interval(key, text, value)
    choices: list[Any]
    if isinstance(value, Glob):
        if not group:
            raise ConfigError(f"{text!r}: glob() is for config groups, and {key} is none; write choice(…)")
        choices = [name for name in groups[key] if _matches(name, value)]
    elif isinstance(value, ChoiceSweep):
        choices = [_plain(each) for each in value.list]
    elif isinstance(value, RangeSweep):
        # Summed steps may fall slightly short of the end of a range, which is excluded.
        choices = [each for each in map(_tidy, value.range()) if each != value.stop]
    else:
        raise ConfigError(f"{text!r} names one value; it belongs to the run")
    if not choices:
        raise ConfigError(f"{text!r} names no value")
    if getattr(value, "shuffle", False):
        random.Random(f"{seed}:{key}").shuffle(choices)
    unique = [each for n, each in enumerate(choices) if repr(each) not in map(repr, choices[:n])]
    return Axis(key, text, tuple(unique), is_group=group)


def _interval(key: str, text: str, value: Any) -> Axis:
    log, whole = "log" in value.tags, isinstance(value.start, int) and isinstance(value.end, int)
    if not value.start < value.end:
        raise ConfigError(f"{text!r}: the first end of an interval must be smaller than the second")
    if log and value.start <= 0:
        raise ConfigError(f"{text!r}: a logarithmic interval must begin above 0")
    return Axis(key, text, low=value.start, high=value.end, log=log, whole=whole)


def _matches(name: str, glob: Any) -> bool:
    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return fits(glob.include) and not fits(glob.exclude)


def _plain(value: Any) -> Any:
    """Return a parsed element as a dict, list or scalar."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {str(_plain(k)): _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _tidy(value: float) -> float:
    """Round away the error of summed steps: 0.30000000000000004 becomes 0.3."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _parsed(text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"cannot read {text!r}: {str(error).splitlines()[0]}; write key=value") from error


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
