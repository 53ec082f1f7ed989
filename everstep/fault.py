"""Classification of the error or signal that ended an attempt, and the user's line. Torch-free."""

from __future__ import annotations

import bdb
import concurrent.futures
import errno
import os
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from everstep.control_group import memory_groups
from everstep.errors import EverstepError, ShortOfMemoryError
from everstep.outcome import Fault

LONGEST_REASON = 400
"""Largest number of characters of an error's message."""
WATCHDOG_SIGNAL = getattr(signal, "SIGRTMIN", 34) + 5
"""Signal of the watchdog: the first dumps the stacks of a process, the second ends it."""
STACKS_SIGNAL = getattr(signal, "SIGRTMIN", 34) + 6
"""Signal at which a rank writes the stacks of its threads into its log, and goes on."""
_NAMES = """
    EIO ENOSPC EDQUOT EROFS ESTALE ENXIO ENODEV ENOMEM EMFILE ENFILE EAGAIN EBUSY EPERM EREMOTEIO ENOLINK ECONNREFUSED
    ECONNRESET ECONNABORTED EPIPE ENOTCONN ETIMEDOUT EHOSTUNREACH EHOSTDOWN ENETUNREACH ENETDOWN
"""
MACHINE_ERRNOS = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))
"""Errors of disks, file servers, networks and limits. A missing or forbidden file is a user error."""
MACHINE_TYPES = re.compile(r"Connect|Timeout|TimedOut|HTTP|URLError|SSL|Protocol|Transport|Unavailable|BrokenProcess")
"""Names of exceptions with which clients of networks and servers report a fault."""
MACHINE_MESSAGES = re.compile(
    r"(?i)CUDA error|CUDA driver|CUDA out of memory|HIP error|NCCL|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|\bgloo\b|"
    r"connection (closed|reset|refused)|DefaultCPUAllocator|unable to (mmap|open shared memory)|bus error|"
    r"worker .*(killed|died|exited unexpectedly)|cannot allocate memory|can't start new thread"
)
"""Messages of RuntimeErrors with which torch reports devices, memory and peers."""
USER_MESSAGES = re.compile(r"device-side assert")
"""Messages among those that report a mistake: an index out of range on a GPU."""


def fault_of(error: BaseException) -> Fault:
    """Return the fault behind an error: the machine's, if any error in its chain is one of the machine."""
    found = list(chain(error))
    if any(isinstance(each, bdb.BdbQuit) for each in found):
        return Fault.left
    return Fault.machine if any(map(_is_machine, found)) else Fault.user


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the error that it was raised from or during, and so on."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _is_machine(error: BaseException) -> bool:
    if isinstance(error, EverstepError):
        return error.passing or isinstance(error, ShortOfMemoryError)
    if isinstance(error, MemoryError | concurrent.futures.BrokenExecutor):
        return True
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return True
    if any(MACHINE_TYPES.search(kind.__name__) for kind in type(error).__mro__[:-1]):
        return True
    if _is_torch(error):
        return USER_MESSAGES.search(str(error)) is None
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError | RecursionError):
        return False
    return bool(MACHINE_MESSAGES.search(str(error))) and USER_MESSAGES.search(str(error)) is None


def _is_torch(error: BaseException) -> bool:
    """True for an error of a type with which torch reports devices and peers."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    kinds = [getattr(torch, name, None) for name in ("OutOfMemoryError", "AcceleratorError")]
    peers = getattr(getattr(torch, "distributed", None), "DistError", None)
    return isinstance(error, tuple(kind for kind in [*kinds, peers] if kind is not None))


def reason_of(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    text = " ".join(str(error).split())
    cut = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__


def place_of(error: BaseException, plugins: Sequence[str] = ()) -> str:
    """Return `file:line, in function` of the innermost frame in the user's code; empty without one.

    Args:
        plugins: the user's packages, wherever they are installed.
    """
    roots = {name.split(".")[0] for name in plugins}
    for each in chain(error):
        if isinstance(each, SyntaxError) and each.filename:
            return f"{_shown(each.filename)}:{each.lineno}"
        frames = [(frame, line) for frame, line in traceback.walk_tb(each.__traceback__) if _is_users(frame, roots)]
        if frames:
            frame, line = frames[-1]
            return line_of(frame.f_code.co_filename, line, frame.f_code.co_name)
    return ""


def line_of(file: str, line: int, function: str) -> str:
    return f"{_shown(file)}:{line}, in {function}"


def _is_users(frame: FrameType, roots: set[str]) -> bool:
    if str(frame.f_globals.get("__name__", "")).split(".")[0] in roots:
        return True
    return is_users_file(frame.f_code.co_filename)


def is_users_file(file: str) -> bool:
    """True for a file that belongs neither to Everstep, nor to Python, nor to an installed package."""
    if file.startswith("<") or {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return not os.path.abspath(file).startswith(_OTHERS)


def _others() -> tuple[str, ...]:
    ours = Path(__file__).resolve().parent
    library = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")]
    return tuple(f"{path}{os.sep}" for path in [ours, *library])


_OTHERS = _others()
"""Folders of Everstep and of Python."""


def _shown(file: str) -> str:
    """Return a path as the user would type it."""
    near = os.path.relpath(file)
    return file if near.startswith(os.pardir) else near


class OutOfMemoryCount:
    """Count of out-of-memory kills in this control group since the object was made."""

    def __init__(self) -> None:
        self._before = _killed()

    def since(self) -> int:
        """Return the number of kills; 0 when unknown."""
        now = _killed()
        return 0 if now is None or self._before is None else max(0, now - self._before)


def _killed() -> int | None:
    for file, key in _counters():
        try:
            words = dict(line.split()[:2] for line in file.read_text().splitlines() if len(line.split()) > 1)
        except OSError:
            continue
        if words.get(key, "").isdigit():
            return int(words[key])
    return None


def _counters() -> list[tuple[Path, str]]:
    """Return files that may hold the count, this process's group first."""
    return [(group.file("memory.events", "memory.oom_control"), "oom_kill") for group in memory_groups()]


def death_of(who: str, number: int, killed_for_memory: int) -> str:
    """Return `rank 1 was killed by SIGKILL`, and that memory may be the cause.

    Args:
        number: of the signal.
        killed_for_memory: kills counted by the control group since the process was started.
    """
    if number == WATCHDOG_SIGNAL:
        return f"{who} was ended by its watchdog: no Python ran in it (the end of its log has the stacks)"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and killed_for_memory:
        return f"{who} was killed by {name} (out of memory: memory.events oom_kill={killed_for_memory})"
    return f"{who} was killed by {name}"
