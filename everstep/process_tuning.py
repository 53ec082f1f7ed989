"""What a training process asks of the C library and of Python, which suit programs that are short and alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import os
import resource
import sys
from typing import Any

from everstep.errors import ConfigError

LOG = logging.getLogger("everstep")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


class Lasting(io.FileIO):
    """A stream that takes whatever is printed, also when its reader is gone or its disk is full."""

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
    """Open what `>&-` has closed: the next file would get its number, and what is printed would go there."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def keep_printing() -> None:
    """Have no `print`, of ours or of a user, fail for want of a reader: a `tee` that is killed, a closed terminal."""
    open_closed()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        raw = io.BufferedWriter(Lasting(descriptor, "wb", closefd=False))
        setattr(
            sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True, write_through=True)
        )


def refuse_debugger(processes: int) -> None:
    """Have `breakpoint()` say in a line that several processes cannot share a terminal; they would wait for ever."""
    if processes > 1 and "PYTHONBREAKPOINT" not in os.environ:

        def refuse(*_: object, **__: object) -> None:
            raise ConfigError(f"breakpoint(): {processes} processes cannot share a terminal; use job.nproc=1, "
                              "or python -m everstep.trainer")  # fmt: skip

        sys.breakpointhook = refuse


def keep_freed_memory() -> None:
    """Have malloc keep up to 512 MiB that were freed, blocks of up to 64 MiB among them.

    glibc gives blocks of some 100 kB and more back to the system, where each batch would get them anew, page by page
    and zeroed: that costs several times the copy into them.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
            mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def raise_file_limit() -> None:
    """As many open files as the system allows: shards of a store take three each, and 1,024 is a usual start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems name a limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def quieten() -> None:
    """Have torch's C++ report errors alone: its warnings of a peer that has gone are pages of stack frames."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def spare_what_lives() -> None:
    """Have Python's collector look only at what is made from now on.

    Modules and the parts of a run live to the end; a full look at them stalls a step by a tenth of a second.
    """
    gc.collect()
    gc.freeze()
