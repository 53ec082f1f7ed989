"""Checks of file names from elsewhere: plain names, and links that lead out of their folder."""

from __future__ import annotations

import os
from pathlib import Path

from everstep.storage.base import Storage

LONGEST_NAME = 255
"""Bytes of a file name that any file system accepts."""


def is_plain(name: object) -> bool:
    """True if `name` is the name of a file directly in a folder, without a path."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\0"} & set(name):
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:  # a lone surrogate
        return False


def leads_out(storage: Storage, folder: str, name: str) -> bool:
    """True if an entry of a local folder is a link to outside that folder, or to nothing."""
    inside = storage.path(folder)
    if inside is None or not (inside / name).is_symlink():
        return False
    entry = inside / name
    return not entry.exists() or not Path(os.path.realpath(entry)).is_relative_to(os.path.realpath(inside))
