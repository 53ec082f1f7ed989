"""The current folder as a place of Python modules: only for code that the user names.

`python -m` puts it before the standard library. A verb that is called in a run folder or dataset from elsewhere would
then run a `json.py` in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

SAFE_PATH = "PYTHONSAFEPATH"
"""Environment variable of Python: do not put the current folder before all others."""
OURS = "everstep"
"""Its value where the launcher has set it; any text counts for Python."""


def imports_from_here() -> bool:
    """True if this process looks for modules in the current folder, as after `python -m everstep.launch`."""
    return any(not path or path == os.getcwd() for path in sys.path)


def safe_flags() -> list[str]:
    """Return the flags for a Python process that looks into the current folder only if this one does."""
    return [] if imports_from_here() else ["-P"]


def safe_environment() -> Mapping[str, str]:
    """Return variables to the same end, where another program starts Python."""
    return {} if imports_from_here() else {SAFE_PATH: OURS}


def forget_safe_environment() -> None:
    """Take these variables away from the programs that this process starts: they are the user's."""
    if os.environ.get(SAFE_PATH) == OURS:
        del os.environ[SAFE_PATH]


def import_from_here() -> None:
    """Look for modules in the current folder from now on, as the user has named one of their own."""
    if not imports_from_here():
        sys.path.insert(0, os.getcwd())
