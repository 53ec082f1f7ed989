"""What a training process asks of the C library and of Python: it allocates and frees the same sizes for hours."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


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


def spare_what_lives() -> None:
    """Have Python's collector look only at what is made from now on.

    Modules and the parts of a run live to the end; a full look at them stalls a step by a tenth of a second.
    """
    gc.collect()
    gc.freeze()
