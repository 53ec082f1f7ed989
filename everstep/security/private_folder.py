"""Folders on a machine that only one user may read and write, and the variables that may name them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from everstep.errors import ConfigError

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


def private_folder(path: str | Path) -> Path:
    """Return the folder, made if it is missing, after checking that no other user can read or replace it.

    Raises:
        ConfigError: another user owns it or may write to it, or to a folder above it.
    """
    folder = Path(os.path.abspath(path))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot make this folder ({error.strerror or error}); choose another") from error
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise ConfigError(
            f"{folder} is not yours alone (it must be a folder that you own and that only you can write to); "
            "remove it, or choose another"
        )
    folder.chmod(0o700)
    for above in folder.parents:
        if _is_replaceable(above.stat()):
            raise ConfigError(f"{folder}: other users may replace it, since they can write to {above}; choose another")
    return folder


def _is_replaceable(above: os.stat_result) -> bool:
    """True if another user may rename what is in a folder; groups are trusted."""
    others_write = above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX
    return bool(others_write) or above.st_uid not in (0, os.getuid())
