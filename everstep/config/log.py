"""Config of records: metrics, trackers, progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everstep.config.choices import Progress, require


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
    """auto is a bar on a terminal, otherwise plain lines."""
    line_every_s: float = 10.0
    """Seconds between plain lines."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    sinks: list[dict[str, Any]] = field(default_factory=list)
    """Further sinks, each a node with `_target_`: an object with `log(record)` and `close()`."""
    node_every_s: float | None = 5.0
    """Seconds between samples of a node's CPU, memory, disks, network and GPUs; null takes none."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """Key → value of a sweep's trial, for TensorBoard's table of trials; set by the sweep."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "log.every", self.every, "must be ≥ 1")
        require(self.line_every_s >= 0, "log.line_every_s", self.line_every_s, "must be ≥ 0")
        every_s = self.node_every_s
        require(every_s is None or every_s >= 0.1, "log.node_every_s", every_s, "must be ≥ 0.1 or null")
