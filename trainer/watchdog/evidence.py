"""Evidence of a stall: stacks, facts of the kernel about a process, and torch's record of collectives."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from everstep.fault import is_users_file, line_of
from everstep.trainer.watchdog.activity import PAGE
from everstep.trainer.watchdog.heartbeat import Process

FLIGHT_RECORDER = "TORCH_FR_BUFFER_SIZE"
"""Environment variable of torch: number of collectives that its flight recorder keeps."""
FLIGHTS = "2000"
LARGEST_STACKS = 1 << 20
"""Bytes of one dump of the stacks."""
WAITING = re.compile(r"/torch/|/everstep/trainer/distributed/|/trainer/distributed/")
"""Files of which a frame, as the innermost one, waits for other ranks."""
_HEADER = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


class Frame(NamedTuple):
    file: str
    line: int
    function: str

    @property
    def shown(self) -> str:
        return line_of(*self)


@dataclass(frozen=True)
class Evidence:
    """Evidence about one process. The innermost frame of its main thread comes first."""

    frames: Sequence[Frame] = ()
    facts: dict[str, Any] | None = None
    """State, wait channel, CPU seconds and memory, as of /proc."""
    collectives: tuple[int, str] | None = None
    """Number of collectives that the process has entered, and the last one, by the flight recorder."""
    mark: tuple[int, int, int, float] | None = None
    """Phase, step and turn that a frozen process has marked last, and the seconds since."""

    @property
    def line(self) -> str:
        """Innermost line of the user's code, else of any; empty without a stack."""
        users = [frame for frame in self.frames if is_users_file(frame.file)]
        return next((frame.shown for frame in [*users, *self.frames]), "")

    @property
    def waits(self) -> bool:
        """True if the main thread is known to wait in torch or in a collective of ours."""
        return bool(self.frames) and WAITING.search(self.frames[0].file) is not None

    def pack(self) -> dict[str, Any]:
        return {**asdict(self), "frames": list(self.frames)}

    @staticmethod
    def unpack(packed: dict[str, Any]) -> Evidence:
        entered, mark = (None if packed[name] is None else tuple(packed[name]) for name in ("collectives", "mark"))
        return Evidence([Frame(*each) for each in packed["frames"]], packed["facts"], entered, mark)


def main_frames(dump: str, main_thread: int) -> list[Frame]:
    """Return the main thread's frames in the last dump by faulthandler in a text, innermost first."""
    found: list[Frame] = []
    inside = False
    for line in dump.splitlines():
        if header := _HEADER.match(line):
            inside = int(header[1], 16) == main_thread
            found = [] if inside else found
        elif inside and (frame := _FRAME.match(line)):
            found.append(Frame(frame[1], int(frame[2]), frame[3]))
    return found


def dump_stacks() -> str:
    """Return the stacks of all threads of this process."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") if sys.platform == "linux" else _temporary() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return str(file.read().decode(errors="replace"))


def _temporary() -> Any:
    import tempfile

    return tempfile.TemporaryFile()


def process_facts(pid: int) -> dict[str, Any]:
    """Return what the kernel tells about a process; `state` is "gone" if it has ended."""
    base = Path(f"/proc/{pid}")
    try:
        # The name, in parentheses, may contain anything.
        words = (base / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return {"state": "gone" if base.parent.exists() else "unknown"}
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    facts = {
        "state": words[0],
        "parent": int(words[1]),
        "cpu_s": (int(words[11]) + int(words[12])) / tick,
        "threads": int(words[17]),
        "rss_mb": round(int(words[21]) * page / 2**20, 1),
    }
    with contextlib.suppress(OSError):
        facts["wchan"] = (base / "wchan").read_text()
    return facts


def mark_of(process: Process) -> tuple[int, int, int, float] | None:
    """Return the place that another process of this node has marked last, and the seconds since."""
    try:
        with open(f"/proc/{process.pid}/fd/{process.activity}", "rb") as file:
            phase, step, turn, since = PAGE.unpack(file.read(PAGE.size))
    except (OSError, struct.error):
        return None
    return phase, step, turn, time.monotonic() - since


def record_flights() -> None:
    """Have torch record the last collectives of groups made from now on, unless the user decides."""
    os.environ.setdefault(FLIGHT_RECORDER, FLIGHTS)


def flight_record() -> str | None:
    """Return torch's record of the last collectives as JSON; None without a process group or a recorder."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    try:
        from torch._C import _distributed_c10d as c10d

        name = "_dump_nccl_trace_json" if "nccl" in distributed.get_backend() else "_dump_fr_trace_json"
        record: bytes = getattr(c10d, name)(includeCollectives=True, onlyActive=False)
        return record.decode()
    except (AttributeError, RuntimeError, TypeError):
        return None


def collectives_in(record: str | None) -> tuple[int, str] | None:
    """Return the number of collectives that a record shows as entered, over all groups, and the last one."""
    newest: dict[str, int] = {}
    last = ""
    try:
        for entry in json.loads(record or "{}").get("entries", []):
            group = str(entry["process_group"])
            newest[group] = max(newest.get(group, 0), int(entry["collective_seq_id"]))
            last = f"{entry['profiling_name']} {entry['input_sizes']}"
    except (ValueError, KeyError, TypeError):
        return None
    return (sum(newest.values()), last) if newest else None


def is_debugged() -> bool:
    """True if a person may be holding this process: under gdb or strace, or in a debugger of Python."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text()
        if int(status.split("TracerPid:")[1].split()[0]):
            return True
    if "pydevd" in sys.modules or "debugpy" in sys.modules:
        return True
    if "bdb" not in sys.modules:
        return False
    import threading

    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == sys.modules["bdb"].__file__:
            return True
        frame = frame.f_back
    return False
