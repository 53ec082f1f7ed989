"""Failure causes recognized in lines of output, and the remedy for each."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from re import _parser  # type: ignore[attr-defined]  # before Python 3.11 it was sre_parse
from typing import Any

from everstep.config import require

LONGEST_MATCH = 1000
NESTED = "has a repeat within a repeat, as in (a+)+, and could take hours on a line of 30 characters; use one repeat"
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
FEW = 8
"""Highest maximum of an inner repeat, such as the digits of a date: it cannot take exponential time."""
_ONCE = 2
"""A repeat with a lower maximum, such as `?`, is not counted as one."""


def is_nested(pattern: str) -> bool:
    """True if a repeat of the pattern holds another one: matching may take time exponential in the line."""
    return _holds_nested(_parser.parse(pattern), within=False)


def _holds_nested(part: Any, within: bool) -> bool:
    """True for a nested repeat in a parsed pattern, which is a tree of (code, argument)."""
    if isinstance(part, tuple) and len(part) == 2 and str(part[0]) in _REPEATS:
        _, most, inner = part[1]
        repeats = int(most) >= _ONCE
        return (repeats and within and int(most) > FEW) or _holds_nested(inner, within or repeats)
    if isinstance(part, tuple | list | _parser.SubPattern):
        return any(_holds_nested(each, within) for each in part)
    return False


PEER_LOST = "(?:[Cc]onnection (?:closed|reset) by peer|Watchdog caught collective)"


class Remedy(enum.Enum):
    """Remedy for a failed job whose output has matched a cause."""

    stop = "stop"
    """Do not start again: the user must fix the cause, and another start would fail as well."""
    restart = "restart"
    exclude = "exclude"
    """Start again without the node whose output matched."""


@dataclass(kw_only=True)
class CauseConfig:
    match: str = ""
    """Regular expression, searched in every line that the node's processes print."""
    remedy: Remedy = Remedy.restart
    """stop: the user must fix it. restart: start again. exclude: start again without that node."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except (re.error, RecursionError, OverflowError) as error:
            require(False, "match", self.match, f"is no regular expression: {error}")
        require(len(self.match) <= LONGEST_MATCH, "match", self.match[:40], f"must have ≤ {LONGEST_MATCH} characters")
        require(not is_nested(self.match), "match", self.match, NESTED)
        require(bool(self.match), "match", "", "must not be empty: every line would match; null drops a cause")


def known_causes() -> dict[str, CauseConfig]:
    """Return the built-in causes, the most specific first."""
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
        # A rank's own error, not one that the death of another rank has caused.
        (
            "exception",
            Remedy.restart,
            rf"^\[rank\d+\]: (?!(?:[\w.]*\.)?Dist\w*Error|.*{PEER_LOST}|.*ChildFailedError)[\w.]*(?:Error|Exception): ",
        ),
        (
            "peer_lost",
            Remedy.restart,
            rf"(?i){PEER_LOST}|"
            r"^(?:\[.*?\]:\s*)?error: rank \d+.* (?:was killed by SIG|lost another rank)",
        ),
    ]
    return {name: CauseConfig(match=match, remedy=remedy) for name, remedy, match in table}
