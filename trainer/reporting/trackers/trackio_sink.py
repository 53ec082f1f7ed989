"""trackio as a sink: its own database in the user's home, or in TRACKIO_DIR; nothing is sent anywhere."""

from __future__ import annotations

import datetime
import json
import time
import uuid

from everstep.run_folder import RunFolder
from everstep.trainer.reporting.sinks import NO_METRICS, Record


class Trackio:
    """trackio: all attempts of a run write to one run, each step of each kind of record once.

    Args:
        project: trackio's name for a group of runs.
    """

    once = True

    def __init__(self, run: str | None, folder: RunFolder, config: Record, project: str = "everstep") -> None:
        from trackio.sqlite_storage import SQLiteStorage

        folder.storage.create("trackio.json", json.dumps({"id": uuid.uuid4().hex}).encode())
        self.run_id = str(json.loads(folder.storage.read("trackio.json"))["id"])
        self._storage = SQLiteStorage
        self._project, self._name = project, run or self.run_id
        self._config: dict[str, object] | None = dict(config)

    def log(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        at = datetime.datetime.fromtimestamp(float(record.get("time") or time.time()), datetime.UTC)
        values = {f"{kind}/{name}": value for name, value in record.items() if name not in NO_METRICS}
        # Its table holds each id once, so a step that comes again changes nothing.
        self._storage.bulk_log(
            self._project,
            self._name,
            [values],
            steps=[step],
            timestamps=[at.isoformat()],
            config=self._config,
            log_ids=[f"{self.run_id}:{kind}:{step}"],
            run_id=self.run_id,
        )
        self._config = None

    def close(self) -> None:
        """Do nothing: each record is in the database when `log` returns."""
