"""The log of one rank in the run folder: its events, warnings and tracebacks."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from types import TracebackType

from trainer.errors import StorageError
from trainer.run_folder import RunFolder

FORMAT = "%(asctime)s %(levelname)s %(message)s"


class RankLog:
    """While the block lasts, the logger `everstep` writes to the folder; a remote one gets the file at the end."""

    def __init__(self, folder: RunFolder, attempt: int, rank: int) -> None:
        self.folder = folder
        self.name = folder.attempt(attempt, f"rank-{rank:04d}.log")
        local = folder.storage.path(self.name)
        self._spool = None if local is not None else tempfile.TemporaryDirectory()
        self.file = local if local is not None else Path(self._spool.name if self._spool else ".") / "rank.log"

    def __enter__(self) -> RankLog:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.file)
        self._handler.setFormatter(logging.Formatter(FORMAT))
        logger = logging.getLogger("everstep")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("everstep").removeHandler(self._handler)
        self._handler.close()
        if self._spool is not None:
            with contextlib.suppress(StorageError):
                self.folder.storage.write(self.name, self.file.read_bytes())
            self._spool.cleanup()
