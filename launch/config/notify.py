"""Config keys of notifications."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from everstep.config import require

KINDS = ("end", "failure", "stall", "no_progress", "best")


@dataclass(kw_only=True)
class NotifyConfig:
    command: str | None = None
    """Shell line to run; it finds EVERSTEP_EVENT, _RUN, _URL, _STEP and _MESSAGE in its environment."""
    webhook: str | None = None
    """Name of the environment variable that holds the URL to which a JSON object is posted."""
    on: list[str] = field(default_factory=lambda: list(KINDS))
    """Events that are told: end, failure, stall, no_progress, best."""
    no_progress_s: float = 3600.0
    """Seconds without a new step after which `no_progress` is told, once until the next step."""

    def __post_init__(self) -> None:
        named = self.webhook is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.webhook) is not None
        require(named, "job.notify.webhook", "…", "holds the name of an environment variable, never the URL")
        unknown = [kind for kind in self.on if kind not in KINDS]
        require(not unknown, "job.notify.on", self.on, f"must be of {', '.join(KINDS)}")
        require(self.no_progress_s > 0, "job.notify.no_progress_s", self.no_progress_s, "must be > 0")

    @property
    def is_on(self) -> bool:
        return bool(self.on) and (self.command is not None or self.webhook is not None)
