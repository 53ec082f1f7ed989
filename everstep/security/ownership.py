"""Checks that no other user of the machine can write, read or replace a file; files made so."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def other_writer(seen: os.stat_result, owners: tuple[int, ...] = ()) -> str | None:
    """Return why another user can change a file or the entries of a folder; None if only this user can.

    Args:
        owners: user ids that may own it beside this user.
    """
    if seen.st_uid not in (os.getuid(), *owners):
        return f"belongs to {_name_of(seen.st_uid)}"
    if seen.st_mode & stat.S_IWOTH:
        return "can be written by every user"
    if seen.st_mode & stat.S_IWGRP and not _is_group_of_one(seen.st_gid):
        return "can be written by its group"
    return None


def other_reader(seen: os.stat_result) -> str | None:
    """Return the reason why another user can read or change a file or folder; None if only this user can."""
    if seen.st_uid != os.getuid():
        return f"belongs to {_name_of(seen.st_uid)}"
    if seen.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"has mode {stat.S_IMODE(seen.st_mode):03o}, which is open to others"
    return None


def is_replaceable(above: os.stat_result) -> bool:
    """True if another user may rename what is in a folder; groups are trusted."""
    others_write = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    return bool(others_write) or above.st_uid not in (0, os.getuid())


def create_private(path: str | Path, data: bytes) -> None:
    """Create a file that only this user can read; FileExistsError if the name is taken, by a link too."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)


def _is_group_of_one(gid: int) -> bool:
    """True for the group of this user alone, which many systems make for each user (umask 002)."""
    try:
        me, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return me.pw_gid == gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
