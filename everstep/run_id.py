"""Random id of a run, stored beside its config.

Signatures are bound to it and not to the name of the run, which any folder can have.
"""

from __future__ import annotations

import re
import secrets

from everstep.errors import CheckpointError
from everstep.run_folder import RUN_ID, RunFolder


def run_id(folder: RunFolder) -> str:
    """Return the id; empty for a run that has none."""
    try:
        found = folder.storage.read(RUN_ID).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise CheckpointError(f"{folder.url}/{RUN_ID} is damaged: it is not 32 hex digits; restore it from a copy")
    return found


def ensure_run_id(folder: RunFolder) -> str:
    """Return the id, made now if the run has none."""
    if not (found := run_id(folder)):
        folder.storage.create(RUN_ID, f"{secrets.token_hex(16)}\n".encode())
        found = run_id(folder)
    return found
