"""What lines of output say about why a job failed, and what is to be done about it."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from everstep.config import require


class Remedy(enum.Enum):
    """What to do when a line was seen and the job has failed."""

    stop = "stop"
    """The user has to mend something; another start would fail alike."""
    restart = "restart"
    exclude = "exclude"
    """Start again, without the node that said it."""


@dataclass(kw_only=True)
class CauseConfig:
    match: str = ""
    """Regular expression, searched in every line that the node's processes print."""
    remedy: Remedy = Remedy.restart
    """stop: the user must mend something. restart: start again. exclude: start again without the node that said it."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            require(False, "match", self.match, f"is no regular expression: {error}")
        require(bool(self.match), "match", "", "must not be empty: every line would match; null drops a cause")


def known_causes() -> dict[str, CauseConfig]:
    """The causes that every cluster knows, the most telling first."""
    table = [
        ("ecc", Remedy.exclude, r"(?i)uncorrectable ecc error|double.bit ecc"),
        ("xid", Remedy.exclude, r"NVRM: Xid .*: (?:48|63|64|74|79|94|95|119|120)\b|fallen off the bus"),
        ("cuda_hardware", Remedy.exclude, r"CUDA error: (?:hardware|unspecified launch|misaligned|uncorrectable)"),
        ("gpu_gone", Remedy.exclude, r"(?i)no cuda gpus are available|cuda driver initialization failed|GPU is lost"),
        ("disk_full", Remedy.restart, r"No space left on device"),
        (
            "host_memory",
            Remedy.stop,
            r"(?i)oom[-_ ]kill(?!=)|Out of memory: Killed process|DataLoader worker .* Bus error",
        ),
        ("gpu_memory", Remedy.stop, r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError"),
        ("import", Remedy.stop, r"^(?:\[.*?\]:\s*)?(?:ModuleNotFoundError|ImportError|SyntaxError|IndentationError): "),
        ("usage", Remedy.stop, r": error: (?:unrecognized arguments|the following arguments are required)"),
        ("no_script", Remedy.stop, r"can't open file .*: \[Errno 2\]"),
        ("nccl", Remedy.restart, r"ncclSystemError|ncclRemoteError|ncclInternalError|NCCL (?:WARN|error|timeout)"),
        (
            "peer_lost",
            Remedy.restart,
            r"(?i)connection (?:closed|reset) by peer|Watchdog caught collective|"
            r"^(?:\[.*?\]:\s*)?error: rank \d+.* (?:was killed by SIG|lost another rank)",
        ),
    ]
    return {name: CauseConfig(match=match, remedy=remedy) for name, remedy, match in table}
