"""Promotion with a condition: candidate and champions are measured now, on the same samples."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from everstep.errors import ConfigError, EverstepError
from everstep.launch.evaluation import check_code, measure
from everstep.launch.trained import ChosenRun, choose_run
from everstep.registry.condition import Condition, Figures
from everstep.registry.records import Version
from everstep.registry.registry import Registry
from everstep.run_folder import MANIFEST, RESULT
from everstep.storage import open_storage


class NotBetterError(EverstepError):
    """The candidate does not meet the condition; the alias stays where it is."""

    exit_code = 1


@dataclass(frozen=True)
class Verdict:
    """Figures that a condition was decided with."""

    figures: str
    """The measured value of each name in the condition."""
    data: str
    """The set, its number of samples and the digest of the data."""

    def __str__(self) -> str:
        return f"{self.figures} ({self.data})"


def check_condition(
    candidate: Version, champions: Mapping[str, Version | None], condition: Condition, options: argparse.Namespace
) -> Verdict:
    """Measure all versions that a condition names, and return the figures that it holds with.

    Args:
        champions: version of each alias; None for an alias that has none yet.
        options: `on`, `root`, `config_dir`, `trust` and `overrides`, as for `everstep evaluate`.

    Raises:
        NotBetterError: the condition does not hold.
        ConfigError: a version is not what its checkpoint gives, or the checkpoint is gone.
    """
    chosen = _run_of(candidate, options, options.overrides)
    found: dict[str, Mapping[str, float] | None] = dict.fromkeys(champions)
    there = [(alias, version) for alias, version in champions.items() if version is not None]
    wanted: list[tuple[str, Version | None]] = [*there] or [("", None)]
    data = ""
    for alias, version in wanted:
        other = None if version is None else _run_of(version, options, ())
        result = _measured(chosen, other, options.on)
        _check_source(result["checkpoint"], candidate)
        name, found[""] = _only_set(result["sets"], options.on)
        data = f"{name}, {result['sets'][name]['samples']} samples, data {result['data_digest'][:12]}"
        if version is not None:
            _check_source(result["against"]["checkpoint"], version)
            found[alias] = _only_set(result["against"]["sets"], options.on)[1]
    return _decided(candidate, condition, found, data)


def _decided(candidate: Version, condition: Condition, found: Figures, data: str) -> Verdict:
    holds = condition.holds(found)
    verdict = Verdict(condition.figures(found), data)
    if not holds:
        raise NotBetterError(f"--if {condition.text!r}: does not hold for {candidate}: {verdict}; nothing was promoted")
    return verdict


def _measured(chosen: ChosenRun, other: ChosenRun | None, on: str) -> dict[str, Any]:
    if other is not None:
        check_code(chosen, other)
    with tempfile.TemporaryDirectory(prefix="everstep-promotion-") as folder:
        work = open_storage(folder)
        code = measure(chosen, other, work, on)
        if code or not work.exists(RESULT):
            raise EverstepError(f"--if: the evaluation failed (exit code {code}); nothing was promoted")
        result: dict[str, Any] = json.loads(work.read(RESULT))
    return result


def _run_of(version: Version, options: argparse.Namespace, overrides: Sequence[str]) -> ChosenRun:
    """Return the checkpoint that a version was exported from, with the weights that were exported."""
    facts = version.facts
    if not all(isinstance(facts.get(key), str) for key in ("run", "manifest", "weights")) or "step" not in facts:
        raise ConfigError(f"{version}: its export does not say which checkpoint it is of; export and add it again")
    proof = facts.get("proof")
    if isinstance(proof, Mapping) and "cast" in proof:
        raise ConfigError(
            f"{version}: its weights were cast (--dtype), so its checkpoint has other figures; export it without"
        )
    weights = f"evaluate.weights={facts['weights']}"
    return choose_run(f"{facts['run']}@{facts['step']}", options, [*overrides, weights])


def _check_source(checkpoint: str, version: Version) -> None:
    """Raise ConfigError if the checkpoint that was measured is not the one that was exported."""
    manifest = open_storage(checkpoint).read(MANIFEST)
    if blake3(manifest).hexdigest() != version.facts["manifest"]:
        raise ConfigError(f"{version}: {checkpoint} is not the checkpoint that it was exported from; export it again")


def _only_set(sets: Mapping[str, Any], on: str) -> tuple[str, dict[str, float]]:
    """Return name and metrics of the one set that was measured."""
    if len(sets) > 1:
        raise ConfigError(f"--on {on}: the data has {', '.join(sets)}; choose one of them for --if")
    name, facts = next(iter(sets.items()))
    return name, {metric: float(found["value"]) for metric, found in facts["metrics"].items()}


def champions_of(models: Registry, model: str, condition: Condition, to: str) -> tuple[dict[str, Version | None], int]:
    """Return the version of each alias in a condition, and the number of the last move of `to` (0: none).

    Raises:
        ConfigError: an alias other than `to` does not exist.
    """
    moves = {alias: move for alias in {*condition.aliases, to} if (move := models.newest(model, alias))}
    for alias in condition.aliases:
        if alias not in moves and alias != to:
            models.state(model, alias)  # raises, and names the nearest
    champions = {a: models.version(model, moves[a].version) if a in moves else None for a in condition.aliases}
    return champions, moves[to].number if to in moves else 0
