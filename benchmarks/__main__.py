"""`python -m benchmarks overhead | startup | order | windows | restart | render | data …`: prints a Markdown table."""

from __future__ import annotations

import importlib
import sys

NAMES = ("overhead", "startup", "order", "windows", "restart", "render", "data")


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(__doc__, file=sys.stderr)
        return 2
    measure = importlib.import_module(f"benchmarks.{name}").main
    code: int = measure(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
