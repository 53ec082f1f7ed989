"""Checkpoints of a run, and why each is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from everstep.checked_json import mapping, parse
from everstep.config import CheckpointConfig, Goal
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder
from everstep.storage import read_limited

LARGEST_MANIFEST = 256 << 20
MOST = 200
"""Checkpoints that a report lists, the newest."""


@dataclass(frozen=True)
class CheckpointRow:
    """One committed checkpoint."""

    name: str
    step: int
    attempt: int
    size_bytes: int
    files: int
    world: int | None
    metric: float | None
    signed: bool
    time: float
    why: str = ""


def checkpoints(folder: RunFolder, config: CheckpointConfig, goal: Goal) -> list[CheckpointRow]:
    """Return the committed checkpoints, the newest first, each with the reason of the retention."""
    names = [name for name in folder.storage.names(CHECKPOINTS) if len(name.split("-")) == 4]
    found = [row for name in sorted(names)[-MOST:] if (row := _read(folder, name)) is not None]
    ordered = sorted(found, key=lambda row: (row.step, row.attempt), reverse=True)
    return [replace(row, why=_why(row, ordered, config, goal)) for row in ordered]


def _read(folder: RunFolder, name: str) -> CheckpointRow | None:
    """Return the facts of a manifest; None without one: the checkpoint is not committed."""
    try:
        data = read_limited(folder.storage, f"{CHECKPOINTS}/{name}/{MANIFEST}", LARGEST_MANIFEST)
        facts = mapping(parse(data), name)
        files = mapping(facts.get("files"), name)
        return CheckpointRow(
            name,
            int(facts["step"]),
            int(facts["attempt"]),
            sum(int(mapping(each, name)["bytes"]) for each in files.values()),
            len(files),
            facts.get("world"),
            _number(facts.get("metric")),
            bool(facts.get("signature")),
            float(facts.get("time") or 0.0),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        step, attempt = (part if part.isdigit() else "0" for part in name.split("-")[1::2])
        return CheckpointRow(name, int(step), int(attempt), 0, 0, None, None, False, 0.0, "damaged")


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _why(row: CheckpointRow, ordered: Sequence[CheckpointRow], config: CheckpointConfig, goal: Goal) -> str:
    """Return the reasons for which the retention keeps a checkpoint; the same rules as its own."""
    if row.why:
        return f"{row.why}: its manifest cannot be read"
    measured = [each for each in ordered if each.metric is not None]
    best = sorted(measured, key=lambda each: (each.metric or 0.0) * (-1 if goal is Goal.max else 1))
    reasons = [
        "the newest" if row is ordered[0] else "",
        f"one of the {config.keep_last} newest" if row in ordered[1 : config.keep_last] else "",
        "the best" if row in best[:1] and config.keep_best else "",
        f"one of the {config.keep_best} best" if row in best[1 : config.keep_best] else "",
        f"a multiple of {config.keep_every}" if config.keep_every and row.step % config.keep_every == 0 else "",
    ]
    return ", ".join(filter(None, reasons)) or "the next save removes it"
