"""Token of a job on several nodes: the secret by which they recognize each other.

The scheduler passes it in the environment. For a job that was submitted by hand, the head node makes one for each start
and writes it into the run folder, which must be on a disk where a file can be private to this user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from everstep.errors import ConfigError
from everstep.launch.job_start.start_record import Start
from everstep.security.job_secrets import TOKEN, check_token, new_secret
from everstep.security.ownership import create_private, other_reader

FILE = "token"
LONGEST = 4096
"""Characters of the file that are read."""
HINT = f"submit with everstep submit, or export {TOKEN}=$(openssl rand -hex 32) before sbatch"


def offer(start: Start, environment: Mapping[str, str]) -> str:
    """Return the token on the head node; without one in the environment, make it for this start.

    Raises:
        ConfigError: the run folder cannot keep a secret.
    """
    if TOKEN in environment:
        return check_token(environment[TOKEN])
    path, token = _path(start), new_secret()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    create_private(path, token.encode())
    _read(path)  # some file systems show every file as owned by one user, or open to all
    return token


def receive(start: Start, environment: Mapping[str, str]) -> str:
    """Return the token on another node, after the head has offered it.

    Raises:
        ConfigError: this node has none, or other users can read or write it.
    """
    if TOKEN in environment:
        return check_token(environment[TOKEN])
    path = _path(start)
    try:
        return check_token(_read(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{TOKEN} reaches the head node only, not this one; {HINT}") from error


def _path(start: Start) -> str:
    path = start.folder.storage.path(start.path(FILE))
    if path is None:
        raise ConfigError(f"{TOKEN} is not set, and {start.folder.url} is no folder that only you can read; {HINT}")
    return str(path)


def _read(path: str) -> str:
    """Return the text of a file that belongs to this user alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor) as file:
        found = os.fstat(descriptor)
        if why := other_reader(found) if stat.S_ISREG(found.st_mode) else "is no file":
            raise ConfigError(f"{TOKEN}: {path} {why}, so the nodes cannot trust it; {HINT}")
        return file.read(LONGEST)
