"""All config keys of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everstep.config.checkpoint import CheckpointConfig, ResumeConfig
from everstep.config.choices import Access, BadSample, OnHookError, Weights, require
from everstep.config.data_loading import ExcludeConfig, LoaderConfig, OrderConfig, PolicyConfig
from everstep.config.debug import DebugConfig
from everstep.config.groups import (
    EvaluateConfig,
    NonfiniteConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    StopConfig,
)
from everstep.config.log import LogConfig
from everstep.config.run_length import split_length

Node = dict[str, Any]
"""A plug-in: `_target_` names a class or function, the other keys are its arguments."""


@dataclass(kw_only=True)
class RunConfig:
    run: str | None = None
    """Name of the run and of its folder; null derives one from experiment and time."""
    run_root: str = "runs"
    """Folder of runs: a path or any fsspec URL (s3://bucket/runs)."""
    access: Access = Access.private
    """Users of this machine who may read the folder on its disk: private (its user), group, everyone."""
    steps: Any = 1000
    """Optimizer steps in total, or epochs as `3ep`, which become a number at the first start."""
    steps_given: str | None = None
    """The epochs that `steps` was given as; set by itself."""
    global_batch: int = 32
    """Samples per optimizer step, over all processes."""
    micro_batch: int = 32
    """Samples of one forward pass of one process."""
    seed: int = 0
    clip: float | None = 1.0
    """Limit of the gradient norm; null does not clip."""
    ema: float | None = None
    """Decay per step of the moving average of the weights; null keeps none."""
    init_from: str | None = None
    """Weights that a new run starts from: URL of a checkpoint or run, or the path of other weights.

    Other weights are a .safetensors or torch.save file, a folder of Hugging Face or DCP, or registry://URL/MODEL@7.
    """
    init_match: list[str] = field(default_factory=lambda: ["*"])
    """Patterns (`encoder.*`) of the weights to take from there; the others are initialized as usual."""
    init_map: Any = None
    """Old → new patterns of weight names (`bert.*: encoder.*`) for other weights, or a YAML file of them."""
    group_timeout_s: float = 900.0
    """Seconds that a collective may wait for another process before the run counts it as lost."""
    task: Node | None = None
    model: Node | None = None
    data: Node | None = None
    optimizer: Node | None = None
    hooks: list[Node] = field(default_factory=list)
    hooks_on_error: OnHookError = OnHookError.stop
    """stop: a hook that fails ends the run. disable: it is off on that process until the next start."""
    plugins: list[str] = field(default_factory=list)
    """Packages of yours whose classes and functions `_target_` may name."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    exclude: list[ExcludeConfig] = field(default_factory=list)
    """Samples to leave out, each from a step on; the order of all others stays the same."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    bad_samples: BadSample = BadSample.stop
    """stop: an undecodable sample ends the run, with its location. skip: it is left out and reported."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        self.steps, self.steps_given = split_length(self.steps, self.steps_given)
        require(self.steps >= 1, "steps", self.steps, "must be ≥ 1")
        require(self.global_batch >= 1, "global_batch", self.global_batch, "must be ≥ 1")
        require(self.micro_batch >= 1, "micro_batch", self.micro_batch, "must be ≥ 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2⁶³)")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "must be > 0 or null")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "must be in (0, 1) or null")
        require(bool(self.init_match), "init_match", self.init_match, "must name at least one pattern; [*] takes all")
        require(
            self.init_from is not None or self.init_match == ["*"],
            "init_match",
            self.init_match,
            "there is nothing to take while init_from is null",
        )
        require(
            self.init_from is not None or self.init_map is None,
            "init_map",
            self.init_map,
            "there is nothing to rename while init_from is null",
        )
        require(self.group_timeout_s > 0, "group_timeout_s", self.group_timeout_s, "must be > 0")
        require(
            self.evaluate.weights is Weights.model or self.ema is not None,
            "evaluate.weights",
            self.evaluate.weights.value,
            "there is no moving average to evaluate while ema is null",
        )
        turn = self.order.lanes * self.micro_batch
        require(
            self.order.lanes == 1 or self.global_batch % turn == 0,
            "order.lanes",
            self.order.lanes,
            f"times micro_batch={self.micro_batch} it must divide global_batch={self.global_batch}",
        )
        require(
            self.run is None or _is_name(self.run),
            "run",
            self.run,
            "a name has letters, digits, '.', '_', '-', '=', ',', and starts with a letter or digit",
        )


def _is_name(name: str) -> bool:
    plain = name.translate(dict.fromkeys(map(ord, "-_.=,")))  # the last two occur in names of trials
    return plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 128


OPEN_NODES = ("task", "model", "data", "optimizer")
"""Keys whose children belong to a plug-in: its constructor defines them, not this file."""

OPEN_KEYS = (*OPEN_NODES, "schedule.args", "init_map")
"""Keys that take any key below them."""

FREE_ON_RESUME = (
    "steps",
    "steps_given",
    "run_root",
    "access",
    *(
        f"parallel.{key}"
        for key in (
            "kind",
            "shard",
            "checkpoint_blocks",
            "compile",
            "bucket_mb",
            "find_unused",
            "wrap",
        )
    ),
    "checkpoint",
    "evaluate.every",
    "evaluate.batch",
    "stop",
    "log",
    "loader",
    "resume",
    "debug",
    "group_timeout_s",
    "hooks",
    "hooks_on_error",
    "plugins",
    "exclude",
    "policy",
)
"""Keys that may change on resume: they affect no samples, order, randomness or maths of a step."""
