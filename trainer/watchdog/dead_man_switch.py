"""Dead man's switch: a timer of the kernel that ends a process in which no Python runs any more.

A thread cannot do this where a C function holds Python's lock. The timer sends a signal, whose first delivery dumps the
stacks and whose second, CHECK_S later, ends the process. Two are needed since clocks run on while a process is
suspended: when it resumes, the timer fires at once, and the thread that re-arms it must get its chance.
`faulthandler.dump_traceback_later(exit=True)` would end a job that was suspended for long.
"""

from __future__ import annotations

import ctypes
import faulthandler
import sys
import threading

from everstep.fault import WATCHDOG_SIGNAL

CHECK_S = 4.0
"""Seconds between the two signals."""
_CLOCK_MONOTONIC = 1
_SA_RESETHAND, _SA_RESTART = 0x80000000, 0x10000000


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux; notify=0 sends the signal to the process."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_char * 48),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl on x86-64 and AArch64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class DeadManSwitch:
    """The timer of this process; `stacks` is the descriptor that a dump goes to."""

    def __init__(self, stacks: int) -> None:
        self.stacks = stacks
        self._lock = threading.Lock()
        self._timer: ctypes.c_void_p | None = None
        self._action: _Action | None = None
        self._closed = False
        self._c = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        if self._c is None or not hasattr(self._c, "timer_create"):
            self._c = None
            return
        event, timer = _Event(None, WATCHDOG_SIGNAL, 0, b""), ctypes.c_void_p()
        if self._c.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
            self._timer = timer
        self._catch()

    def arm(self, seconds: float) -> None:
        """End the process `seconds` (and CHECK_S) from now, unless it is armed again before."""
        with self._lock:
            if self._closed:
                return
            if self._c is None:
                faulthandler.dump_traceback_later(seconds + CHECK_S, exit=True, file=self.stacks)
            elif self._timer is not None:
                self._catch()
                self._set(seconds, CHECK_S)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._c is None:
                faulthandler.cancel_dump_traceback_later()
            elif self._timer is not None:
                self._set(0.0, 0.0)

    def _set(self, seconds: float, interval: float) -> None:
        whole = [(int(value), int(value % 1 * 1e9)) for value in (interval, seconds)]
        times = _Times(*whole[0], *whole[1])
        assert self._c is not None
        self._c.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def _catch(self) -> None:
        """Have the next signal dump the stacks, from C, and the one after it end the process."""
        assert self._c is not None
        if self._action is None:
            faulthandler.register(WATCHDOG_SIGNAL, file=self.stacks, all_threads=True)
            self._action = _Action()
            self._c.sigaction(WATCHDOG_SIGNAL, None, ctypes.byref(self._action))
            self._action.flags |= ctypes.c_int(_SA_RESETHAND | _SA_RESTART).value
        self._c.sigaction(WATCHDOG_SIGNAL, ctypes.byref(self._action), None)
