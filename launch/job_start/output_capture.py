"""Output of a node's processes: forwarded at once, the last lines kept to find the cause of a failure."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Mapping

from everstep.launch.config import CauseConfig
from everstep.launch.config.failure_patterns import known_causes
from everstep.launch.job_start.cause_search import search, search_in_time

KEPT_LINES = 400
SHOWN = 500
"""Characters of the matching line that are recorded."""
DRAIN_S = 5.0
"""Seconds to wait for the last output: an orphaned process may keep the pipe open without end."""


class Output:
    """A pipe for the block's processes; its lines are written to our own stdout."""

    def __init__(self, causes: Mapping[str, CauseConfig]) -> None:
        self.causes = causes
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)

    def __enter__(self) -> Output:
        self._reading, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        self._thread.join(DRAIN_S)

    def _pass_on(self) -> None:
        with os.fdopen(self._reading, "rb") as pipe:
            for line in pipe:
                os.write(1, line)
                self._lines.append(line.decode(errors="replace").rstrip())

    def cause(self) -> tuple[str | None, str]:
        """Return the name of the first cause that matches one of the last lines, and the line."""
        return find_cause(self.causes, list(self._lines))


def find_cause(causes: Mapping[str, CauseConfig], lines: list[str]) -> tuple[str | None, str]:
    """Return the first cause in order with its newest line; (None, "") if no cause matches.

    The job's own patterns are searched first, and with a time limit.
    """
    usual = known_causes()
    own = {name: cause.match for name, cause in causes.items() if usual.get(name) != cause}
    built_in = {name: cause.match for name, cause in causes.items() if name not in own}
    name, line = search_in_time(own, lines) if own and lines else (None, "")
    if name is None:
        name, line = search(built_in, lines)
    return name, line[:SHOWN]
