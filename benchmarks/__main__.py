"""`python -m benchmarks NAME [options]` prints a Markdown table; the names are those in `NAMES`."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "overhead", "startup", "order", "windows", "restart", "render", "data", "checkpoint", "resume", "upload", "sweep",
    "asha", "watchdog",
)  # fmt: skip


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(f"usage: python -m benchmarks {' | '.join(NAMES)} [options]", file=sys.stderr)
        return 2
    measure = importlib.import_module(f"benchmarks.{name}").main
    code: int = measure(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
