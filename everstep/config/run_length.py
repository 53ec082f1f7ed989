"""Length of a run: a number of steps, or epochs (`3ep`) that become steps once the data is known."""

from __future__ import annotations

import math
import re
from fractions import Fraction

UNRESOLVED = 2**62
"""Stands for the steps of a run whose data has not been read yet."""
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:ep|epochs?)", re.IGNORECASE)
_TOKENS = re.compile(r"[\d.]+(?:e\d+)?\s*tok(?:ens?)?", re.IGNORECASE)


def split_length(steps: object, given: str | None) -> tuple[int, str | None]:
    """Return the number of steps (UNRESOLVED without data), and the epochs as they were given.

    Raises:
        ValueError: in one line, with what to write.
    """
    if isinstance(steps, str) and (found := _EPOCHS.fullmatch(steps.strip())) is not None:
        if not Fraction(found[1]):
            raise ValueError(f"steps={steps!r}: must be > 0; change steps")
        return UNRESOLVED, f"{found[1]}ep"
    if isinstance(steps, str) and steps.strip().isdecimal():
        steps = int(steps)
    if isinstance(steps, bool) or not isinstance(steps, int):
        tokens = isinstance(steps, str) and _TOKENS.fullmatch(steps.strip()) is not None
        why = "only the task knows how many tokens a sample has; divide by those of a global batch, and "
        raise ValueError(
            f"steps={'null' if steps is None else repr(steps)}: {why if tokens else ''}write a whole number of steps, "
            "or epochs as 3ep"
        )
    return steps, given


def steps_of(given: str, samples: int, global_batch: int) -> int:
    """Return the steps in which that many epochs of the data are seen whole."""
    return max(1, math.ceil(Fraction(given.removesuffix("ep")) * samples / global_batch))
