"""All config keys of a sweep."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.config import Goal, require
from everstep.errors import ConfigError, nearest


class Sampler(enum.Enum):
    """Sampler that chooses the values of a trial."""

    grid = "grid"
    """All combinations, each once."""
    random = "random"
    qmc = "qmc"
    """A scrambled Halton sequence: like random, but more even."""
    tpe = "tpe"
    cmaes = "cmaes"
    nsga2 = "nsga2"


class Pruner(enum.Enum):
    """Pruner that stops unpromising trials early."""

    none = "none"
    asha = "asha"
    hyperband = "hyperband"
    median = "median"
    patience = "patience"


class Budget(enum.Enum):
    """Unit of the rungs."""

    steps = "steps"
    samples = "samples"
    epochs = "epochs"


PURE = (Sampler.grid, Sampler.random, Sampler.qmc)
"""Samplers whose trial n depends only on the seed and n."""
RUNGED = (Pruner.asha, Pruner.hyperband)
FREE = ("trials", "max_failures", "poll_s")
"""Keys that may change when a sweep is resumed."""


@dataclass(kw_only=True)
class SweepConfig:
    sampler: Sampler = Sampler.grid
    pruner: Pruner = Pruner.none
    trials: int | None = None
    """Number of trials; null is all of a grid."""
    metric: list[str] = field(default_factory=list)
    """Evaluation metrics to optimize; empty is evaluate.metric. With several, the best are the Pareto set."""
    goal: list[Goal] = field(default_factory=list)
    """Goal of each metric; empty is evaluate.goal for all."""
    seed: int = 0
    max_failures: int | None = None
    """Failed trials after which no new trial is started; null is no limit."""
    space: list[str] = field(default_factory=list)
    """Overrides with several values, as on the command line; those of the command line are added to these."""
    constraint: str | None = None
    """package.module.function of yours: takes a trial's values, returns those to use, or null to omit it."""
    rungs: list[float] | None = None
    """asha, hyperband: the budgets, from small to large; null is steps/eta², steps/eta, steps."""
    budget: Budget = Budget.steps
    epoch_samples: int | None = None
    """Samples of one epoch, for budget=epochs: the launcher does not read datasets."""
    eta: int = 3
    """asha, hyperband: one trial in so many is promoted to the next rung."""
    warmup_trials: int = 4
    """median: trials that must have passed a step before others are compared with them there."""
    patience: int = 3
    """patience: consecutive evaluations without a better value after which a trial is stopped."""
    poll_s: float = 2.0
    """Seconds between polls of jobs and metrics."""

    def __post_init__(self) -> None:
        require(self.trials is None or self.trials >= 1, "sweep.trials", self.trials, "must be ≥ 1 or null")
        require(
            self.trials is not None or self.sampler is Sampler.grid,
            "sweep.trials",
            self.trials,
            f"sweep.sampler={self.sampler.value} could go on for ever; say how many",
        )
        require(
            self.max_failures is None or self.max_failures >= 1,
            "sweep.max_failures",
            self.max_failures,
            "must be ≥ 1 or null",
        )
        require(self.eta >= 2, "sweep.eta", self.eta, "must be ≥ 2")
        require(self.patience >= 1, "sweep.patience", self.patience, "must be ≥ 1")
        require(self.warmup_trials >= 1, "sweep.warmup_trials", self.warmup_trials, "must be ≥ 1")
        require(self.poll_s > 0, "sweep.poll_s", self.poll_s, "must be > 0")
        require(
            len(self.goal) in (0, 1, len(self.metric)),
            "sweep.goal",
            [goal.value for goal in self.goal],
            f"must be one for each of {len(self.metric)} metrics",
        )
        require(
            len(self.metric) < 2 or self.sampler in (*PURE, Sampler.nsga2),
            "sweep.sampler",
            self.sampler.value,
            "has one objective; with several metrics take nsga2, grid, random or qmc",
        )
        require(
            len(self.metric) < 2 or self.pruner is Pruner.none,
            "sweep.pruner",
            self.pruner.value,
            "has one objective; with several metrics take none",
        )
        require(
            self.budget is not Budget.epochs or self.epoch_samples is not None,
            "sweep.epoch_samples",
            self.epoch_samples,
            "budget=epochs needs the samples of one",
        )
        rungs = self.rungs
        require(
            rungs is None or (rungs == sorted(set(rungs)) and len(rungs) > 1 and rungs[0] > 0),
            "sweep.rungs",
            rungs,
            "must be two or more, from small to large",
        )


def sweep_config(node: Mapping[str, Any]) -> SweepConfig:
    """Return the typed sweep config; a one-line ConfigError for a key or value that does not fit."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in dataclasses.fields(SweepConfig)]
    for key in node:
        if key not in known:
            raise ConfigError(f"no key 'sweep.{key}'{nearest(f'sweep.{key}', [f'sweep.{name}' for name in known])}")
    one_or_many = {key: [node[key]] for key in ("metric", "goal", "space") if isinstance(node.get(key), str)}
    try:
        made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), dict(node) | one_or_many))
    except (OmegaConfBaseException, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        raise ConfigError(f"sweep.{key}: {lines[0]}" if key else lines[0]) from error
    if not isinstance(made, SweepConfig):
        raise ConfigError(f"sweep={node!r}: must be a group of keys")
    return made


def plain(config: SweepConfig) -> dict[str, Any]:
    """Return the config as dicts, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        return [convert(each) for each in value] if isinstance(value, list) else value

    return {key: convert(value) for key, value in dataclasses.asdict(config).items()}
