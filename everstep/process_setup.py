"""Settings of the C library and of Python for a long-running training process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError
from everstep.security.private_folder import private_folder

LOG = logging.getLogger("everstep")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable of torch: folder of compiled code, with that of Triton below."""
_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


class Lasting(io.FileIO):
    """An output stream that never fails, even when its reader is gone or its disk is full."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.failed:
                self.failed = True
                LOG.warning("nobody gets what is printed any more (%s); that ends nothing", error)
            return len(memoryview(data).cast("B"))


def open_closed() -> None:
    """Open standard streams closed by `>&-`: otherwise the next file would get the number, and the output."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def keep_printing() -> None:
    """Keep `print`, also in user code, from failing without a reader: a killed `tee`, a closed terminal."""
    open_closed()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        raw = io.BufferedWriter(Lasting(descriptor, "wb", closefd=False))
        setattr(
            sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True, write_through=True)
        )


def refuse_debugger(processes: int) -> None:
    """Make `breakpoint()` raise ConfigError with several processes: they would wait for a terminal."""
    if processes > 1 and "PYTHONBREAKPOINT" not in os.environ:

        def refuse(*_: object, **__: object) -> None:
            raise ConfigError(
                f"breakpoint(): {processes} processes cannot share a terminal; use job.nproc=1, debug.rank=0, "
                "or python -m everstep.trainer"
            )

        sys.breakpointhook = refuse


def keep_freed_memory() -> None:
    """Make malloc keep up to 512 MiB of freed memory, in blocks of up to 64 MiB.

    glibc returns blocks of some 100 kB and more to the system, from which each batch would get them anew, page by page
    and zeroed: that takes several times as long as the copy into them.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
            mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def raise_file_limit() -> None:
    """Raise the limit of open files to its maximum: remote shards take three each, 1,024 is usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems report a limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def quieten() -> None:
    """Limit torch's C++ log to errors: its warnings about a lost peer are pages of stack frames."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def use_own_cache() -> None:
    """Set torch's cache of compiled code to a folder of this user, unless the user has chosen one.

    The default is /tmp/torchinductor_USER. Torch makes it as soon as an optimizer is imported, which fails if another
    user has put a file there, and loads its libraries and pickles if another user has made it. So this comes first.

    Raises:
        ConfigError: another user has made the folder of this user.
    """
    if not os.environ.get(INDUCTOR_CACHE):
        cache = private_folder(Path(tempfile.gettempdir()) / f"everstep-compiled-{os.getuid()}", INDUCTOR_CACHE)
        os.environ[INDUCTOR_CACHE] = str(cache)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import without garbage collections: modules stay, and searching them took a quarter of the imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spare_what_lives() -> None:
    """Exclude existing objects from Python's garbage collection.

    Modules and the parts of a run live to the end; a full collection over them stalls a step by a tenth of a second.
    """
    gc.collect()
    gc.freeze()
