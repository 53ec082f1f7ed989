"""Folders on a machine that only one user may read and write, and the variables that may name them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from everstep.errors import ConfigError
from everstep.security.ownership import is_replaceable, other_writer

VARIABLES = ("HOME", "JOB_TMPDIR", "LOCAL_SCRATCH", "SCRATCH", "SLURM_JOB_ID", "SLURM_TMPDIR", "TMPDIR", "UID", "USER",
             "XDG_RUNTIME_DIR")  # fmt: skip
"""Variables that a path may name. Others may be secrets, and all users can read the name of a folder."""
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def expand(path: str, key: str) -> str:
    """Expand ~ and $NAMES of VARIABLES in a path.

    Raises:
        ConfigError: a name is not one of them, or this machine does not set it.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in VARIABLES:
            raise ConfigError(f"{key}={path!r}: ${name} may not be part of a path; use one of {', '.join(VARIABLES)}")
        known = str(os.getuid()) if name == "UID" else os.environ.get(name)
        if not known:
            raise ConfigError(
                f"{key}={path!r}: this node has no such variable (${name}) in its environment; set it, or change it"
            )
        return known

    return os.path.expanduser(VARIABLE.sub(value, path))


def private_folder(path: str | Path, key: str, value: str | Path | None = None) -> Path:
    """Return the folder, made if it is missing, after checking that no other user can read or replace it.

    Args:
        key: name of the config key or variable that chooses the folder, for messages.
        value: its value; the folder itself by default.

    Raises:
        ConfigError: another user owns it or may write to it, or to a folder above it.
    """
    folder = Path(os.path.abspath(path))
    place, fix = f"{key}={value}: {folder}" if value else f"{key}={folder}: it", f"set {key} to another folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{place} cannot be made ({error.strerror or error}); {fix}") from error
    seen = folder.lstat()
    if why := other_writer(seen) if stat.S_ISDIR(seen.st_mode) else "is no folder":
        raise ConfigError(f"{place} {why} (it must be yours alone); remove it, or {fix}")
    folder.chmod(0o700)
    for above in folder.parents:
        if is_replaceable(above.stat()):
            raise ConfigError(f"{place} can be replaced by other users, who can write to {above}; {fix}")
    return folder
