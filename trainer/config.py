"""What a run is: every key with its type, default, unit and meaning. No torch here, so that a login node can check it.

YAML in conf/ says only what differs from these defaults and which plug-in is used. A plug-in (task, model, data,
optimizer, hooks) is a node with `_target_`; its constructor is its schema.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import ConfigError

Node = dict[str, Any]
"""A plug-in: `_target_` names a class or function, the other keys are its arguments."""


class ParallelKind(enum.Enum):
    """How the model is spread over processes."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Dtype(enum.Enum):
    """The type that the forward and backward passes compute in; weights stay in fp32 (fp64 with fp64)."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Goal(enum.Enum):
    """Whether a smaller or a larger value of the metric is better."""

    min = "min"
    max = "max"


class Weights(enum.Enum):
    """Which weights are evaluated."""

    model = "model"
    ema = "ema"


class Nonfinite(enum.Enum):
    """What to do with a step whose loss or gradient is NaN or Inf."""

    skip = "skip"
    rollback = "rollback"


class BadSample(enum.Enum):
    """What to do with a sample that cannot be decoded."""

    stop = "stop"
    skip = "skip"


class Worker(enum.Enum):
    """What reads and transforms data beside training."""

    process = "process"
    thread = "thread"


class Progress(enum.Enum):
    """How the run shows itself on rank 0's terminal."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


class Shape(enum.Enum):
    """The curve of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


def require(fits: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError with the value, the limit and the key to change unless `fits`."""
    if not fits:
        raise ValueError(f"{key}={value!r}: {rule}; change {key}")


@dataclass(kw_only=True)
class ParallelConfig:
    kind: ParallelKind = ParallelKind.ddp
    shard: int | None = None
    """Processes that share one copy of the model under hsdp; the others replicate it. Must divide the world."""
    checkpoint_blocks: int = 0
    """Activation checkpointing: 0 none, 1 every block, n every n-th block of the model's `blocks`."""
    compile: str | None = None
    """Backend for torch.compile (`inductor`, `aot_eager`, `eager`), or null."""
    bucket_mb: int = 25
    """Size of DDP's gradient buckets in MiB."""
    find_unused: bool = False
    """DDP only: search each step for parameters that got no gradient."""

    def __post_init__(self) -> None:
        require(self.shard is None or self.shard >= 1, "parallel.shard", self.shard, "must be ≥ 1 or null")
        require(self.kind is not ParallelKind.hsdp or self.shard is not None, "parallel.shard", self.shard,
                "hsdp needs the number of processes that share one copy of the model")  # fmt: skip
        require(self.shard is None or self.kind is ParallelKind.hsdp, "parallel.shard", self.shard,
                f"only hsdp has it, parallel.kind is {self.kind.value}")  # fmt: skip
        require(self.checkpoint_blocks >= 0, "parallel.checkpoint_blocks", self.checkpoint_blocks, "must be ≥ 0")
        require(self.bucket_mb >= 1, "parallel.bucket_mb", self.bucket_mb, "must be ≥ 1")

    def check_world(self, world: int) -> None:
        """ConfigError where the model cannot be spread over so many processes as is asked."""
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
    """wsd only: the last part of the run in which the rate falls."""
    over_steps: int | None = None
    """Steps that the curve spans; null is `steps`. Set it when `steps` will grow later."""

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "must be ≥ 0")
        require(0 <= self.final_fraction <= 1, "schedule.final_fraction", self.final_fraction, "must be in [0, 1]")
        require(0 < self.decay_fraction <= 1, "schedule.decay_fraction", self.decay_fraction, "must be in (0, 1]")
        require(self.over_steps is None or self.over_steps >= 1, "schedule.over_steps", self.over_steps,
                "must be ≥ 1 or null")  # fmt: skip


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; one more is written when the run ends or is stopped."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the best held-out metric to keep."""
    keep_every: int | None = None
    """Keep for good each checkpoint whose step is a multiple of this; null keeps none for that reason."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "must be ≥ 1")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be ≥ 1")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be ≥ 0")
        require(self.keep_every is None or self.keep_every >= 1, "checkpoint.keep_every", self.keep_every,
                "must be ≥ 1 or null")  # fmt: skip


@dataclass(kw_only=True)
class EvaluateConfig:
    every: int | None = None
    """Steps between evaluations on held-out data; null evaluates only at the end."""
    batch: int | None = None
    """Samples per microbatch of the evaluation; null is `micro_batch`."""
    limit: int | None = None
    """Held-out samples to use; null is all."""
    metric: str = "loss"
    """The metric that picks the best checkpoint and stops early."""
    goal: Goal = Goal.min
    patience: int | None = None
    """Early stopping: evaluations in a row without a better metric after which the run is done; null never."""
    min_delta: float = 0.0
    """How much better counts as better."""
    weights: Weights = Weights.model

    def __post_init__(self) -> None:
        for key in ("every", "batch", "limit", "patience"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"evaluate.{key}", value, "must be ≥ 1 or null")
        require(self.min_delta >= 0, "evaluate.min_delta", self.min_delta, "must be ≥ 0")


@dataclass(kw_only=True)
class NonfiniteConfig:
    policy: Nonfinite = Nonfinite.skip
    """skip: the step changes nothing. rollback: back to the last checkpoint, and the samples since are passed over."""
    limit: int = 10
    """Such steps (or rollbacks) in one run after which it ends as diverged."""

    def __post_init__(self) -> None:
        require(self.limit >= 1, "nonfinite.limit", self.limit, "must be ≥ 1")


@dataclass(kw_only=True)
class StopConfig:
    wall_time_s: float | None = None
    """Seconds since the start of the process after which the run saves and ends as preempted; null never."""
    poll_s: float = 1.0
    """Seconds between looks for the stop marker in the run folder."""

    def __post_init__(self) -> None:
        require(self.wall_time_s is None or self.wall_time_s > 0, "stop.wall_time_s", self.wall_time_s, "must be > 0")
        require(self.poll_s > 0, "stop.poll_s", self.poll_s, "must be > 0")


@dataclass(kw_only=True)
class WandbConfig:
    enabled: bool = False
    project: str = "everstep"
    entity: str | None = None
    group: str | None = None
    mode: str = "online"
    """online, offline or disabled."""

    def __post_init__(self) -> None:
        modes = ("online", "offline", "disabled")
        require(self.mode in modes, "log.wandb.mode", self.mode, f"must be one of {', '.join(modes)}")


@dataclass(kw_only=True)
class LogConfig:
    every: int = 10
    """Steps between records of the training metrics."""
    progress: Progress = Progress.auto
    """auto is a bar on a terminal and plain lines elsewhere."""
    line_every_s: float = 10.0
    """Seconds between plain lines."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require(self.every >= 1, "log.every", self.every, "must be ≥ 1")
        require(self.line_every_s >= 0, "log.line_every_s", self.line_every_s, "must be ≥ 0")


@dataclass(kw_only=True)
class OrderConfig:
    shuffle: bool = True
    """false: each dataset in its stored order, epoch after epoch."""
    window: int | None = 64
    """Shards whose samples are mixed at a time; null mixes all. Each node needs about this many at hand."""
    lanes: int = 1
    """Streams with shards of their own, that a batch deals its microbatches to in turn: with as many as there are
    processes, or a multiple of it, a node reads only its share of the shards. The samples of a lane stay in it for an
    epoch."""

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 1, "order.window", self.window, "must be ≥ 1 shard or null")
        require(self.lanes >= 1, "order.lanes", self.lanes, "must be ≥ 1")


@dataclass(kw_only=True)
class ExcludeConfig:
    from_step: int = 1
    """The first step that does without the samples, as the log counts steps; on resume it lies after the checkpoint."""
    samples: list[int] = field(default_factory=list)
    """Ids, as `everstep data trace` prints them."""

    def __post_init__(self) -> None:
        require(self.from_step >= 1, "exclude.from_step", self.from_step, "must be ≥ 1")
        require(all(sample >= 0 for sample in self.samples), "exclude.samples", self.samples, "must be ≥ 0")


@dataclass(kw_only=True)
class LoaderConfig:
    prefetch: int = 2
    """Steps of data that are made ready ahead of need; 0 reads when the step asks, small samples some steps at once."""
    workers: int = 0
    """Processes or threads per rank that read and transform; 0 reads in one thread of the trainer."""
    worker: Worker = Worker.process
    """thread: less memory and no copy between processes, where the work waits for disks or leaves Python's lock."""
    ahead_mb: int = 256
    """MB of remote data that are fetched ahead of need; 0 fetches when a batch asks."""
    cache: str | None = None
    """Folder on the node's own disk where remote shards are kept, shared by all its processes; null is
    $EVERSTEP_CACHE or ~/.cache/everstep."""
    cache_gb: float | None = None
    """Size of that folder in GB, above which the shards not used for longest go; null is half of what the disk has."""

    def __post_init__(self) -> None:
        require(self.prefetch >= 0, "loader.prefetch", self.prefetch, "must be ≥ 0")
        require(self.workers >= 0, "loader.workers", self.workers, "must be ≥ 0")
        require(self.ahead_mb >= 0, "loader.ahead_mb", self.ahead_mb, "must be ≥ 0")
        require(self.cache_gb is None or self.cache_gb > 0, "loader.cache_gb", self.cache_gb, "must be > 0 or null")


@dataclass(kw_only=True)
class ResumeConfig:
    allow: list[str] = field(default_factory=list)
    """Keys that may differ from those that the run was started with."""


@dataclass(kw_only=True)
class RunConfig:
    run: str | None = None
    """Name of the run and of its folder; null makes one from the experiment and the time."""
    run_root: str = "runs"
    """Folder of runs: a path or any fsspec URL (s3://bucket/runs)."""
    steps: int = 1000
    """Optimizer steps in all."""
    global_batch: int = 32
    """Samples per optimizer step, over all processes."""
    micro_batch: int = 32
    """Samples that one process passes through the model at once."""
    seed: int = 0
    clip: float | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    ema: float | None = None
    """Decay per step of the moving average of the weights; null keeps none."""
    init_from: str | None = None
    """URL of a checkpoint, or of a run, whose weights a new run starts from."""
    init_match: list[str] = field(default_factory=lambda: ["*"])
    """Patterns (`encoder.*`) of the weights to take from there; the others begin as they would without it."""
    group_timeout_s: float = 600.0
    """Seconds that a collective may wait for another process before the run counts it as lost."""
    task: Node | None = None
    model: Node | None = None
    data: Node | None = None
    optimizer: Node | None = None
    hooks: list[Node] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    """Packages of yours whose classes and functions `_target_` may name."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    exclude: list[ExcludeConfig] = field(default_factory=list)
    """Samples to leave out, each from some step on; the places of all others in the order stay the same."""
    bad_samples: BadSample = BadSample.stop
    """stop: a sample that cannot be decoded ends the run with its place. skip: it is left out, and reported."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "must be ≥ 1")
        require(self.global_batch >= 1, "global_batch", self.global_batch, "must be ≥ 1")
        require(self.micro_batch >= 1, "micro_batch", self.micro_batch, "must be ≥ 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2⁶³)")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "must be > 0 or null")
        require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "must be in (0, 1) or null")
        require(bool(self.init_match), "init_match", self.init_match, "must name at least one pattern; [*] takes all")
        require(self.init_from is not None or self.init_match == ["*"], "init_match", self.init_match,
                "there is nothing to take while init_from is null")  # fmt: skip
        require(self.group_timeout_s > 0, "group_timeout_s", self.group_timeout_s, "must be > 0")
        require(self.evaluate.weights is Weights.model or self.ema is not None, "evaluate.weights",
                self.evaluate.weights.value, "there is no moving average to evaluate while ema is null")  # fmt: skip
        turn = self.order.lanes * self.micro_batch
        require(self.order.lanes == 1 or self.global_batch % turn == 0, "order.lanes", self.order.lanes,
                f"times micro_batch={self.micro_batch} it must divide global_batch={self.global_batch}")  # fmt: skip
        require(self.run is None or _is_name(self.run), "run", self.run,
                "a name has letters, digits, '.', '_' and '-', and starts with a letter or digit")  # fmt: skip


def _is_name(name: str) -> bool:
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    return plain.isascii() and plain.isalnum() and name[0].isalnum() and len(name) <= 128


def first_steps_without(excludes: Iterable[ExcludeConfig]) -> dict[int, int]:
    """For each excluded sample the first step that does without it."""
    first: dict[int, int] = {}
    for exclude in excludes:
        for sample in exclude.samples:
            first[sample] = min(exclude.from_step, first.get(sample, exclude.from_step))
    return first


OPEN_NODES = ("task", "model", "data", "optimizer")
"""Keys whose children belong to a plug-in: its constructor, not this file, says which exist."""

FREE_ON_RESUME = (
    "steps", "run_root", "parallel", "checkpoint", "evaluate.every", "evaluate.batch", "stop", "log", "loader",
    "resume", "group_timeout_s", "hooks", "plugins", "exclude",
)  # fmt: skip
"""Keys that may change when a run goes on: they touch neither samples, order, randomness nor the maths of a step."""
