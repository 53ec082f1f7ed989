"""Log of one rank in the run folder: its events, warnings and tracebacks."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from everstep.errors import StorageError
from everstep.fault import STACKS_SIGNAL
from everstep.run_folder import RunFolder

FORMAT = "%(asctime)s %(levelname)s %(message)s"
UPLOAD_EVERY_S = 10.0
"""Seconds between two uploads of a log to a store.

A user may follow the log, and the process may be killed.
"""


class LogFile(logging.FileHandler):
    """Log file that stops on a full disk without stopping the run."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._tell(sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        if not self._told:
            self._told = True
            print(f"{self.baseFilename} cannot be written: {error}", file=sys.stderr)


class RankLog:
    """Context in which the logger `everstep` writes to the folder; a store gets regular uploads."""

    def __init__(self, folder: RunFolder, attempt: int, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.name = folder.attempt(attempt, f"rank-{rank:04d}.log")
        local = folder.storage.path(self.name)
        self._spool = None if local is not None else tempfile.TemporaryDirectory()
        self.file = local if local is not None else Path(self._spool.name if self._spool else ".") / "rank.log"
        self._closed = threading.Event()
        self._uploading = threading.Thread(target=self._upload_what_comes, daemon=True)

    @property
    def shown(self) -> str:
        """Path or URL of the log, for the user."""
        return f"{self.folder.url}/{self.name}"

    def __enter__(self) -> RankLog:
        self._handler = self._open()
        self._handler.setFormatter(logging.Formatter(FORMAT))
        logger = logging.getLogger("everstep")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        logger.info("rank %d is process %d on %s", self.rank, os.getpid(), socket.gethostname())
        if isinstance(self._handler, LogFile):
            faulthandler.register(STACKS_SIGNAL, self._handler.stream)
        if self._spool is not None:
            self._uploading.start()
        return self

    def _open(self) -> logging.Handler:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return LogFile(self.file)
        except OSError as error:
            print(f"{self.file} cannot be written: {error}", file=sys.stderr)
            return logging.NullHandler()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.unregister(STACKS_SIGNAL)
        logging.getLogger("everstep").removeHandler(self._handler)
        self._handler.close()
        if self._spool is not None:
            self._closed.set()
            self._uploading.join()
            self._upload()
            self._spool.cleanup()

    def _upload_what_comes(self) -> None:
        uploaded = 0
        while not self._closed.wait(UPLOAD_EVERY_S):
            if self.file.exists() and (size := self.file.stat().st_size) > uploaded:
                self._upload()
                uploaded = size

    def _upload(self) -> None:
        with contextlib.suppress(StorageError, OSError):
            self.folder.storage.write(self.name, self.file.read_bytes())
