"""Messages of the launcher to the user."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """Print one line on stderr. A closed terminal must not keep the run from an orderly end."""
    with contextlib.suppress(OSError):
        print(f"everstep: {line}", file=sys.stderr, flush=True)
