"""Config keys for finding a fault; the files of conf/debug set them together with others."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.config.choices import require


@dataclass(kw_only=True)
class DebugConfig:
    overfit: int | None = None
    """Train on the first n global batches again and again; a loss that does not fall ends the run as diverged."""
    anomaly: bool = False
    """End at the first output or gradient that is not finite, with the name of its layer. Slow."""
    profile: int | None = None
    """Steps to profile, after two others: a trace for Perfetto and a table of the dearest operators."""
    determinism: bool = False
    """Take two steps twice from the same state; a difference ends the run with the place where it begins."""
    post_mortem: bool = False
    """Open pdb where an error was raised; with several processes only that of `rank`."""
    rank: int | None = None
    """With several processes: the one whose pdb gets the terminal. `breakpoint()` of the others does nothing."""

    def __post_init__(self) -> None:
        for key in ("overfit", "profile"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"debug.{key}", value, "must be ≥ 1 or null")
        require(self.rank is None or self.rank >= 0, "debug.rank", self.rank, "must be ≥ 0 or null")
