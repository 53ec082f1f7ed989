"""The words that a key may have, and how a value that does not fit is told."""

from __future__ import annotations

import enum


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


class Buffers(enum.Enum):
    """How buffers that forward passes change are kept equal on all ranks."""

    broadcast = "broadcast"
    mean = "mean"
    local = "local"


class Nonfinite(enum.Enum):
    """What to do with a step whose loss or gradient is NaN or Inf."""

    skip = "skip"
    rollback = "rollback"


class Busy(enum.Enum):
    """What to do when a checkpoint is due and the one before is still being written."""

    wait = "wait"
    skip = "skip"


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
