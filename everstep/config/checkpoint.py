"""Config of checkpoints: when they are saved, which are kept, and what a resume may change."""

from __future__ import annotations

from dataclasses import dataclass, field

from everstep.config.choices import Busy, require

AUTO = "auto"


@dataclass(kw_only=True)
class LocalTierConfig:
    every: int | str | None = AUTO
    """Steps between checkpoints on the node tier, besides those in the run folder; null makes none.

    auto: copies on the node that wrote them, as often as 1 % of the time allows, while there is room.
    """
    path: str = "/dev/shm/everstep-$UID"
    """Folder of the node tier, local to each node: a RAM disk or NVMe; $NAMES are expanded on the node."""

    @property
    def is_automatic(self) -> bool:
        return self.every == AUTO

    def __post_init__(self) -> None:
        known = self.every >= 1 if isinstance(self.every, int) else self.every in (AUTO, None)
        require(known, "checkpoint.local.every", self.every, "must be ≥ 1, auto or null")
        require(
            self.path.startswith(("/", "$", "~")),
            "checkpoint.local.path",
            self.path,
            "must be an absolute path on the node",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; one more is saved when the run ends or is stopped."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the best held-out metric to keep."""
    keep_every: int | None = None
    """Keep each checkpoint permanently whose step is a multiple of this; null keeps none for this reason."""
    busy: Busy = Busy.wait
    """Choice while the previous save is pending: wait for it, or skip this checkpoint."""
    max_failures: int = 5
    """Consecutive saves that may fail before the run ends; each is retried, after 10 s, 20 s, 40 s …"""
    timeout_s: float = 1800.0
    """Seconds after which a save that is incomplete on some rank counts as failed."""
    self_test: bool = True
    """Restore a run's first checkpoint into a second model and optimizer, and compare them.

    Ranks are also compared at saves. A state that is not restored exactly ends the run.
    """
    local: LocalTierConfig = field(default_factory=LocalTierConfig)
    """Frequent checkpoints on the nodes' own disks, each part on two nodes: `checkpoint=two_tiers`."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "must be ≥ 1")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be ≥ 1")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be ≥ 0")
        require(
            self.keep_every is None or self.keep_every >= 1,
            "checkpoint.keep_every",
            self.keep_every,
            "must be ≥ 1 or null",
        )
        require(self.max_failures >= 1, "checkpoint.max_failures", self.max_failures, "must be ≥ 1")
        require(self.timeout_s > 0, "checkpoint.timeout_s", self.timeout_s, "must be > 0")


@dataclass(kw_only=True)
class ResumeConfig:
    allow: list[str] = field(default_factory=list)
    """Keys that may differ from those that the run was started with.

    `world` is the number of processes, if the loss depends on it.
    """
