"""Mode of the top folder of a run on a local disk.

Other users cannot reach anything below a private one, whatever the umask.
"""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path

from everstep.config import Access
from everstep.errors import ConfigError
from everstep.storage import Storage

MODES = {Access.private: 0o700, Access.group: 0o750, Access.everyone: 0o755}
"""The group may read and not write, as write access is enough to stop a run and change its results."""


def make_folder(storage: Storage, access: Access) -> None:
    """Create the top folder of a run or sweep with its mode; one that exists keeps its own.

    An object store has no modes, and a folder that cannot be made is reported by the first write.
    """
    path = storage.path()
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        _set(path, MODES[access])


def change_access(storage: Storage, access: Access) -> None:
    """Give the top folder another mode.

    Raises:
        ConfigError: another user owns the folder.
    """
    path = storage.path()
    if path is None:
        return
    try:
        _set(path, MODES[access])
    except OSError as error:
        raise ConfigError(
            f"access={access.value}: cannot change the mode of {path} ({error.strerror or error}); "
            "only the owner of the folder can, so leave access as it was"
        ) from error


def _set(path: Path, mode: int) -> None:
    # A folder of a project often hands its group down by the setgid bit, which a plain chmod would remove.
    path.chmod(mode | (path.stat().st_mode & stat.S_ISGID))
