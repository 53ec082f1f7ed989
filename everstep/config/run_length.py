"""Length of a run: a number of steps, or epochs (`3ep`) or tokens, which become steps with the data."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from everstep.errors import ConfigError

UNRESOLVED = 2**62
"""Stands for the steps of a run whose data has not been read yet."""
EPOCHS, TOKENS = "ep", "tok"
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:ep|epochs?)", re.IGNORECASE)
_TOKENS = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e\+?\d{1,2})?)\s*tok(?:ens?)?", re.IGNORECASE)


def split_length(steps: object, given: str | None) -> tuple[int, str | None]:
    """Return the number of steps (UNRESOLVED without data), and the epochs or tokens as they were given.

    Raises:
        ValueError: in one line, with what to write.
    """
    for pattern, unit in ((_EPOCHS, EPOCHS), (_TOKENS, TOKENS)):
        if isinstance(steps, str) and (found := pattern.fullmatch(steps.strip())) is not None:
            if not Fraction(found[1]):
                raise ValueError(f"steps={steps!r}: must be > 0; change steps")
            return UNRESOLVED, f"{found[1].lower()}{unit}"
    if isinstance(steps, str) and steps.strip().isdecimal():
        steps = int(steps)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ValueError(
            f"steps={'null' if steps is None else repr(steps)}: write a whole number of steps, epochs as 3ep, or "
            "tokens as 2e9tok"
        )
    return steps, given


def steps_of(given: str, samples: int, global_batch: int, tokens: int | None = None) -> int:
    """Return the steps in which that many epochs or tokens of the data are seen whole.

    Args:
        tokens: those of each sample; None if samples differ, or it is not known.

    Raises:
        ConfigError: the length is in tokens, and it is not known how many a sample has.
    """
    if not given.endswith(TOKENS):
        return max(1, math.ceil(Fraction(given.removesuffix(EPOCHS)) * samples / global_batch))
    if tokens is None:
        raise ConfigError(
            f"steps={given}: the data does not say how many tokens each sample has; write a whole number of steps "
            "(tokens divided by those of a global batch) or epochs as 3ep, or prepare the data with pack="
        )
    return max(1, math.ceil(Fraction(given.removesuffix(TOKENS)) / (tokens * global_batch)))
