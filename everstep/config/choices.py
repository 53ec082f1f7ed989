"""Values of keys with a fixed choice, and the check of a value."""

from __future__ import annotations

import enum


class ParallelKind(enum.Enum):
    """Distribution of the model over processes."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Access(enum.Enum):
    """Users of the machine who may read a run on its disk."""

    private = "private"
    group = "group"
    everyone = "everyone"


class Dtype(enum.Enum):
    """Type of the forward and backward passes; weights stay in fp32 (fp64 with fp64)."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class OnHookError(enum.Enum):
    """Consequence of a hook that fails."""

    stop = "stop"
    disable = "disable"


class Goal(enum.Enum):
    """Direction in which the metric improves."""

    min = "min"
    max = "max"


class Weights(enum.Enum):
    """Weights to evaluate."""

    model = "model"
    ema = "ema"


class Buffers(enum.Enum):
    """Synchronization over ranks of buffers that forward passes change."""

    auto = "auto"
    first = "first"
    mean = "mean"
    local = "local"


class Nonfinite(enum.Enum):
    """Reaction to a step whose loss or gradient is NaN or Inf."""

    skip = "skip"
    rollback = "rollback"


class Busy(enum.Enum):
    """Reaction when a checkpoint is due while the previous save is pending."""

    wait = "wait"
    skip = "skip"


class BadSample(enum.Enum):
    """Reaction to a sample that cannot be decoded."""

    stop = "stop"
    skip = "skip"


class Worker(enum.Enum):
    """Kind of workers that read and transform data."""

    process = "process"
    thread = "thread"


class Progress(enum.Enum):
    """Display of progress on rank 0's terminal."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


class Shape(enum.Enum):
    """Shape of the learning-rate schedule after warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


def require(fits: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError with the value, the limit and the key to change unless `fits`."""
    if not fits:
        raise ValueError(f"{key}={value!r}: {rule}; change {key}")
