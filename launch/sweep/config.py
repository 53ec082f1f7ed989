"""All keys of a sweep."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.config import Goal, require
from everstep.errors import ConfigError, nearest


class Sampler(enum.Enum):
    """Who chooses the values of a trial."""

    grid = "grid"
    """Every combination, once."""
    random = "random"
    qmc = "qmc"
    """A scrambled Halton sequence: random to look at, and more even."""
    tpe = "tpe"
    cmaes = "cmaes"
    nsga2 = "nsga2"


class Pruner(enum.Enum):
    """Who cuts short what does not promise much."""

    none = "none"
    asha = "asha"
    hyperband = "hyperband"
    median = "median"
    patience = "patience"


class Budget(enum.Enum):
    """What rungs are counted in."""

    steps = "steps"
    samples = "samples"
    epochs = "epochs"


PURE = (Sampler.grid, Sampler.random, Sampler.qmc)
"""Trial n of these depends on nothing but the seed and n."""
RUNGED = (Pruner.asha, Pruner.hyperband)
FREE = ("trials", "max_failures", "poll_s")
"""Keys that may change as a sweep goes on."""


@dataclass(kw_only=True)
class SweepConfig:
    sampler: Sampler = Sampler.grid
    pruner: Pruner = Pruner.none
    trials: int | None = None
    """Trials in all; null is all of a grid."""
    metric: list[str] = field(default_factory=list)
    """What decides, of the evaluation; empty is evaluate.metric. With several the best are those of the Pareto set."""
    goal: list[Goal] = field(default_factory=list)
    """For each metric; empty is evaluate.goal for all."""
    seed: int = 0
    max_failures: int | None = None
    """Failed trials after which nothing new is started; null goes on whatever fails."""
    space: list[str] = field(default_factory=list)
    """Overrides that name several values, as on the command line; those given there come on top."""
    constraint: str | None = None
    """package.module.function of yours: takes the values of a trial, returns those that count, or null to leave it out.
    """
    rungs: list[float] | None = None
    """asha, hyperband: the budgets, from small to large; null is steps/eta², steps/eta, steps."""
    budget: Budget = Budget.steps
    epoch_samples: int | None = None
    """Samples of one epoch, for budget=epochs: the launcher does not read datasets."""
    eta: int = 3
    """asha, hyperband: one of so many goes on to the next rung."""
    warmup_trials: int = 4
    """median: trials that have to get past a step before others are held to them there."""
    patience: int = 3
    """patience: evaluations in a row without a better value after which a trial is stopped."""
    poll_s: float = 2.0
    """Seconds between looks at jobs and metrics."""

    def __post_init__(self) -> None:
        require(self.trials is None or self.trials >= 1, "sweep.trials", self.trials, "must be ≥ 1 or null")
        require(self.trials is not None or self.sampler is Sampler.grid, "sweep.trials", self.trials,
                f"sweep.sampler={self.sampler.value} could go on for ever; say how many")  # fmt: skip
        require(self.max_failures is None or self.max_failures >= 1, "sweep.max_failures", self.max_failures,
                "must be ≥ 1 or null")  # fmt: skip
        require(self.eta >= 2, "sweep.eta", self.eta, "must be ≥ 2")
        require(self.patience >= 1, "sweep.patience", self.patience, "must be ≥ 1")
        require(self.warmup_trials >= 1, "sweep.warmup_trials", self.warmup_trials, "must be ≥ 1")
        require(self.poll_s > 0, "sweep.poll_s", self.poll_s, "must be > 0")
        require(len(self.goal) in (0, 1, len(self.metric)), "sweep.goal", [goal.value for goal in self.goal],
                f"must be one for each of {len(self.metric)} metrics")  # fmt: skip
        require(len(self.metric) < 2 or self.sampler in (*PURE, Sampler.nsga2), "sweep.sampler", self.sampler.value,
                "has one objective; with several metrics take nsga2, grid, random or qmc")  # fmt: skip
        require(len(self.metric) < 2 or self.pruner is Pruner.none, "sweep.pruner", self.pruner.value,
                "has one objective; with several metrics take none")  # fmt: skip
        require(self.budget is not Budget.epochs or self.epoch_samples is not None, "sweep.epoch_samples",
                self.epoch_samples, "budget=epochs needs the samples of one")  # fmt: skip
        rungs = self.rungs
        require(rungs is None or (rungs == sorted(set(rungs)) and len(rungs) > 1 and rungs[0] > 0), "sweep.rungs",
                rungs, "must be two or more, from small to large")  # fmt: skip


def sweep_config(node: Mapping[str, Any]) -> SweepConfig:
    """The typed sweep from its keys; ConfigError in one line for what does not fit."""
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
    """As dicts, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        return [convert(each) for each in value] if isinstance(value, list) else value

    return {key: convert(value) for key, value in dataclasses.asdict(config).items()}
