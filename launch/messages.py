"""What the launcher tells the user while a run is under way."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """One line on stderr; a terminal that is gone must not keep the run from an orderly end."""
    with contextlib.suppress(OSError):
        print(f"everstep: {line}", file=sys.stderr, flush=True)
