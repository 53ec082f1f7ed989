"""Config groups of a run, each a dataclass with its own checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everstep.config.choices import (
    Buffers,
    Dtype,
    Goal,
    Nonfinite,
    ParallelKind,
    Shape,
    Weights,
    require,
)
from everstep.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    kind: ParallelKind = ParallelKind.ddp
    shard: int | None = None
    """Processes that share one copy of the model under hsdp; others replicate it. Divides the world size."""
    checkpoint_blocks: int = 0
    """Activation checkpointing: 0 none, 1 every unit (see `wrap`), n every n-th unit."""
    compile: str | None = None
    """Backend for torch.compile (`inductor`, `aot_eager`, `eager`), or null."""
    bucket_mb: int = 25
    """Size of DDP's gradient buckets in MiB."""
    find_unused: bool = False
    """DDP only: search each step for parameters without a gradient, if batches do not reach all of them."""
    wrap: list[str] = field(default_factory=list)
    """Units that FSDP shards and activation checkpointing recomputes.

    Class names (BertLayer) or patterns of module paths (encoder.layer.*); empty detects repeated blocks.
    """
    buffers: Buffers = Buffers.auto
    """Buffers that forward passes change (running statistics, codebooks).

    Each microbatch starts from the values at the start of the step. first: the step ends with those that the first
    microbatch left. mean: with their mean over the microbatches. auto: mean for running statistics of BatchNorm and
    InstanceNorm, first for all others. local: each process has its own, changed by one microbatch after the other, and
    rank 0's are saved, so no resume is exact.
    """
    sync_batchnorm: bool = False
    """BatchNorm statistics over the microbatches of all processes instead of each process's own."""

    def __post_init__(self) -> None:
        require(self.shard is None or self.shard >= 1, "parallel.shard", self.shard, "must be ≥ 1 or null")
        require(
            self.kind is not ParallelKind.hsdp or self.shard is not None,
            "parallel.shard",
            self.shard,
            "hsdp needs the number of processes that share one copy of the model",
        )
        require(
            self.shard is None or self.kind is ParallelKind.hsdp,
            "parallel.shard",
            self.shard,
            f"only hsdp has it, parallel.kind is {self.kind.value}",
        )
        require(self.checkpoint_blocks >= 0, "parallel.checkpoint_blocks", self.checkpoint_blocks, "must be ≥ 0")
        require(self.bucket_mb >= 1, "parallel.bucket_mb", self.bucket_mb, "must be ≥ 1")

    def check_world(self, world: int) -> None:
        """Raise ConfigError if the model cannot be distributed over this many processes."""
        if self.kind is ParallelKind.single and world > 1:
            raise ConfigError(
                f"parallel=single on {world} processes: it trains on one; use parallel=ddp, or job.nproc=1"
            )
        if self.shard is not None and (self.shard > world or world % self.shard):
            raise ConfigError(
                f"parallel.shard={self.shard} does not divide the {world} processes; change parallel.shard or job.nproc"
            )


@dataclass(kw_only=True)
class PrecisionConfig:
    dtype: Dtype = Dtype.fp32
    init_scale: float = 65536.0
    """fp16 only: the first loss scale; it halves on overflow."""
    growth_interval: int = 2000
    """fp16 only: steps without overflow after which the scale doubles."""

    def __post_init__(self) -> None:
        require(self.init_scale > 0, "precision.init_scale", self.init_scale, "must be > 0")
        require(self.growth_interval >= 1, "precision.growth_interval", self.growth_interval, "must be ≥ 1")


@dataclass(kw_only=True)
class ScheduleConfig:
    shape: Shape = Shape.constant
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to the learning rate."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the highest (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """wsd only: final fraction of the run in which the learning rate falls."""
    over_steps: int | None = None
    """Steps that the schedule spans; null is `steps`. Set it when `steps` will grow later."""
    _target_: str | None = None
    """A function of yours in place of `shape`: the rate's factor at a progress of 0 to 1."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that function, by name."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "must be ≥ 0")
        require(0 <= self.final_fraction <= 1, "schedule.final_fraction", self.final_fraction, "must be in [0, 1]")
        require(0 < self.decay_fraction <= 1, "schedule.decay_fraction", self.decay_fraction, "must be in (0, 1]")
        require(
            self.over_steps is None or self.over_steps >= 1,
            "schedule.over_steps",
            self.over_steps,
            "must be ≥ 1 or null",
        )
        require(
            self._target_ is None or self.shape is Shape.constant,
            "schedule.shape",
            self.shape.value,
            f"schedule._target_={self._target_} gives the curve; choose schedule=constant",
        )
        require(
            self._target_ is not None or not self.args,
            "schedule.args",
            self.args,
            "no function takes them while schedule._target_ is null",
        )

    @property
    def node(self) -> dict[str, Any] | None:
        """The user's function as a plug-in, or None."""
        return None if self._target_ is None else {**self.args, "_target_": self._target_}


@dataclass(kw_only=True)
class EvaluateConfig:
    every: int | None = None
    """Steps between evaluations on held-out data; null evaluates only at the end."""
    batch: int | None = None
    """Samples per microbatch of the evaluation; null is `micro_batch`."""
    limit: int | None = None
    """Held-out samples to use; null is all."""
    metric: str = "loss"
    """Metric of the best checkpoint and of early stopping."""
    goal: Goal = Goal.min
    patience: int | None = None
    """Early stopping: consecutive evaluations without a better metric that end the run; null never."""
    min_delta: float = 0.0
    """Smallest improvement that counts as better."""
    weights: Weights = Weights.model

    def __post_init__(self) -> None:
        for key in ("every", "batch", "limit", "patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"evaluate.{key}", value, "must be ≥ 1 or null")
        require(self.min_delta >= 0, "evaluate.min_delta", self.min_delta, "must be ≥ 0")


@dataclass(kw_only=True)
class NonfiniteConfig:
    policy: Nonfinite = Nonfinite.skip
    """skip: the step changes nothing. rollback: restore the last checkpoint and skip the samples since."""
    limit: int = 10
    """Such steps (or rollbacks) in one run after which it ends as diverged."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, "nonfinite.limit", self.limit, "must be ≥ 1")


@dataclass(kw_only=True)
class StopConfig:
    wall_time_s: float | None = None
    """Seconds since the start of the process after which the run saves and ends as preempted; null never."""
    poll_s: float = 1.0
    """Seconds between polls of the stop marker in the run folder."""
    grace_s: float | None = None
    """Grace period: seconds from the stop signal to the kill; null uses the launcher's EVERSTEP_GRACE_S."""
    stall_s: float | None = 600.0
    """Seconds without progress until the watchdog names the rank that is behind and ends the attempt.

    null: off. What is done for the first time may take 30 times as long: compilers, tuners and caches are at work.
    """

    def __post_init__(self) -> None:
        require(self.wall_time_s is None or self.wall_time_s > 0, "stop.wall_time_s", self.wall_time_s, "must be > 0")
        require(self.poll_s > 0, "stop.poll_s", self.poll_s, "must be > 0")
        require(self.grace_s is None or self.grace_s >= 0, "stop.grace_s", self.grace_s, "must be ≥ 0 or null")
        require(self.stall_s is None or self.stall_s > 0, "stop.stall_s", self.stall_s, "must be > 0 or null")
