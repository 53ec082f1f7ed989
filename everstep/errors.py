"""Exceptions with a message for the user.

EverstepError                 one clear line: the value, the limit, the key to change
├── ConfigError               a key, a value or a combination that cannot run       exit code 2
├── DataError                 a dataset that is missing, damaged or not the one     exit code 2
├── StorageError              a store that refuses or does not answer               exit code 2
├── CheckpointError           nothing good to restore, or a save that failed        exit code 2
├── MachineError              a node or a network that fails; started again         exit code 1
├── ShortOfMemoryError        the device's memory is too small for the microbatch   exit code 1
├── SupersededError           a newer attempt owns the run folder                   exit code 4
└── DivergedError             too many steps with NaN or Inf                        exit code 3
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters of C0 and C1, and those that change the text direction."""


class EverstepError(Exception):
    """Base of all errors whose message is meant for the user; `exit_code` is the process's."""

    exit_code = 2
    told = False
    """True on a rank that received the error from rank 0, which prints it."""
    passing = False
    """True if a restart may succeed: a full disk, an unreachable store, a lost node."""


class ConfigError(EverstepError):
    """A key, a value or a combination of them that cannot run."""


class DataError(EverstepError):
    """A dataset that is missing, damaged, or not the one that the run was started on."""


class StorageError(EverstepError):
    """A store that refuses or does not answer."""


class CheckpointError(EverstepError):
    """No checkpoint that can be restored, or a save that failed."""


class MachineError(EverstepError):
    """A faulty node, network or clock; another start may succeed."""

    exit_code = 1
    passing = True


class ShortOfMemoryError(EverstepError):
    """Too little device memory for the microbatch; `micro_batch` is the size for the next start to try."""

    exit_code = 1

    def __init__(self, message: str, micro_batch: int | None) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch


class SupersededError(EverstepError):
    """A newer attempt owns the run folder; this one must not write to it any more."""

    exit_code = 4


class DivergedError(EverstepError):
    """More steps gave NaN or Inf than the run allows."""

    exit_code = 3


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the choice nearest to `word`, or an empty string if none is near."""
    known = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {known[matches[0]]!r}?" if matches else ""


def printable(text: str) -> str:
    """Escape characters that a terminal would interpret; line breaks and tabs stay."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def misread(said: str, options: Iterable[str], more: str) -> ConfigError:
    """Return argparse's error as one line, with the option that was probably meant.

    Args:
        options: all options, with their dashes.
        more: the command that lists them.
    """
    known = [name for name in options if name != "--help"]
    unknown = said.removeprefix("unrecognized arguments: ").split()
    if not said.startswith("unrecognized arguments: "):
        return ConfigError(f"{said.removeprefix('argument ')}; see {more}")
    word = next((word for word in unknown if word.startswith("-")), None)
    if word is None:
        return ConfigError(f"{unknown[0]!r} is more than is asked for; see {more}")
    name = word.split("=")[0]
    return ConfigError(f"no option {name}{nearest(name, known) or f'; see {more}'}")
