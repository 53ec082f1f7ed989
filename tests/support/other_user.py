"""Another user of this machine: a forked child with a second uid, which only root can make."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

UID = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as a second user of the machine")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users reach: pytest's own folders are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="everstep-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def as_another(act: Callable[[], object]) -> str:
    """Return the result of `act` for another user, as text, or the name of its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(0)
            os.setgroups([])
            os.setgid(UID)
            os.setuid(UID)
            os.write(writing, str(act()).encode())
        except OSError as error:
            os.write(writing, type(error).__name__.encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said
