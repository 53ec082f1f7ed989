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
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(token)
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
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{path} is not yours alone (uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}), and the nodes "
                f"would trust others; {HINT}"
            )
        return file.read(LONGEST)
