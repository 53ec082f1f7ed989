"""Prints what a process is given, and ends as it is asked to."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


def shown(name: str) -> list[str]:
    return Path(f"/proc/self/{name}").read_text().rstrip("\0").split("\0")


def main(how: str) -> None:
    facts = {"pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "group": os.getpgrp(),
             "folder": os.getcwd(), "first": sys.path[:2], "argv": sys.argv[1:], "environment": dict(os.environ),
             "temporary": tempfile.gettempdir(), "read": sys.stdin.read(), "open": os.listdir("/proc/self/fd"),
             "term": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "torch": "torch" in sys.modules,
             "shown": [shown("cmdline"), shown("environ")]}  # fmt: skip
    print(json.dumps(facts), flush=True)
    atexit.register(print, "at exit", file=sys.stderr)
    if how == "nested":
        subprocess.run([sys.executable, "-m", "support.process_facts", "0"], stdin=subprocess.DEVNULL, check=True)
    elif how == "error":
        raise ValueError("asked for")
    elif how == "wait":
        signal.pause()
    sys.exit(int(how) if how.isdigit() else "asked for")


if __name__ == "__main__":
    main(sys.argv[1])
