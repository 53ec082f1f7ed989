"""A file in this process's memory for a child's ending that the run folder does not accept."""

from __future__ import annotations

import os
import sys

from everstep.outcome import Ending
from everstep.run_folder import ENDING_FILE

LONGEST_ENDING = 1 << 16


class EndingFile:
    """A file in this process's memory for a child's ending that the run folder does not accept."""

    def __enter__(self) -> EndingFile:
        self._file = os.memfd_create("everstep-ending") if sys.platform == "linux" else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def environment(self) -> dict[str, str]:
        return {} if self._file is None else {ENDING_FILE: f"/proc/{os.getpid()}/fd/{self._file}"}

    def read(self) -> Ending | None:
        """Return the ending that was written; None if there is none or it cannot be read."""
        try:
            return None if self._file is None else Ending.from_json(os.pread(self._file, LONGEST_ENDING, 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
