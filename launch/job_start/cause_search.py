"""Search of failure patterns in the last lines of output, in a process of its own with a time limit.

The time of a job's regular expression may grow with a high power of the line's length, and Python cannot interrupt a
match. The config refuses nested repeats; this limit is for all other slow patterns.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping

LONGEST_LINE = 2000
"""Characters of a line that are searched."""
SEARCH_S = 10.0
Patterns = Mapping[str, str]


def search(patterns: Patterns, lines: list[str]) -> tuple[str | None, str]:
    """Return the first pattern in order with its newest line; (None, "") if none matches."""
    cut = [line[:LONGEST_LINE] for line in lines]
    for name, pattern in patterns.items():
        compiled = re.compile(pattern)
        for line in reversed(cut):
            if compiled.search(line):
                return name, line
    return None, ""


def search_in_time(patterns: Patterns, lines: list[str]) -> tuple[str | None, str]:
    """Search each pattern in a child; one that takes more than SEARCH_S counts as no match."""
    for name, pattern in patterns.items():
        asked = json.dumps([{name: pattern}, [line[:LONGEST_LINE] for line in lines]])
        command = [sys.executable, "-I", "-S", __file__]
        try:
            done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SEARCH_S, check=False)
        except subprocess.TimeoutExpired:
            slow = f"everstep: job.causes.{name}.match={pattern!r}: over {SEARCH_S:.0f} s, ignored; simplify it"
            print(slow, file=sys.stderr)
            continue
        if done.returncode == 0 and (found := json.loads(done.stdout))[0] is not None:
            return found[0], found[1]
    return None, ""


if __name__ == "__main__":
    print(json.dumps(search(*json.load(sys.stdin))))
