"""Parsing of job values with a form of their own: a time, a range of nodes."""

from __future__ import annotations

import re

UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
OURS = re.compile(r"(?:\d+[dhms])+")
SLURMS = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
TIME_FORMS = "write 24h, 90m, 1d12h, or as Slurm does 1-12:00:00 or 24:00:00"


def seconds(text: str) -> int:
    """Return the seconds of a time like 24h, 1d12h, or Slurm's HH:MM:SS, MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    ValueError for anything else, also for a bare number: Slurm takes it for minutes, other tools for seconds.
    """
    plain = text.strip().lower()
    if OURS.fullmatch(plain):
        return sum(int(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)([dhms])", plain))
    form = SLURMS.fullmatch(plain)
    if form is None or (form["days"] is None and ":" not in plain):
        raise ValueError(TIME_FORMS)
    parts = [int(part) for part in form["clock"].split(":")]
    if form["days"] is None:  # MM:SS or HH:MM:SS; after days the first is hours
        parts = [0, *parts] if len(parts) == 2 else parts
    hours, minutes, rest = [*parts, 0, 0][:3]
    return ((int(form["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def node_range(nodes: int | str) -> tuple[int, int]:
    """Return the minimum and maximum of nodes: (4, 4) for 4, (2, 4) for "2:4"; ValueError if malformed."""
    if isinstance(nodes, int):
        fewest = most = nodes
    else:
        form = re.fullmatch(r"(\d+):(\d+)", nodes.strip())
        if form is None:
            raise ValueError("must be a number, or MIN:MAX")
        fewest, most = int(form[1]), int(form[2])
    if not 1 <= fewest <= most:
        raise ValueError("must be ≥ 1, and MIN ≤ MAX")
    return fewest, most
