"""MLflow as a sink: a store in the run folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from everstep.config.dotted import leaves
from everstep.errors import ConfigError
from everstep.run_folder import MLFLOW, RunFolder
from everstep.trainer.reporting.sinks import NO_METRICS, Record

LONGEST_VALUE = 500
"""Characters of a parameter that every store of MLflow accepts."""
MOST_PARAMETERS = 100
"""Parameters that one request may have."""


class MLflow:
    """MLflow: all attempts of a run write to one MLflow run, each step of each metric once.

    Args:
        experiment: name of MLflow's experiment.
        tracking_uri: address of a server or store; null is MLFLOW_TRACKING_URI, else a folder in the run folder.
    """

    once = True

    def __init__(
        self,
        run: str | None,
        folder: RunFolder,
        config: Record,
        experiment: str = "everstep",
        tracking_uri: str | None = None,
    ) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its folder of files needs no database
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _store_in(folder)
        self._client = MlflowClient(tracking_uri=self.uri)
        self.run_id = self._run(folder, run, experiment, config)
        self._known = self._steps()
        """Metric → steps that the store has."""

    def log(self, record: Record) -> None:
        from mlflow.entities import Metric

        step, at = int(record["step"]), int(float(record.get("time") or time.time()) * 1000)
        metrics = []
        for name, value in record.items():
            key = f"{record['kind']}/{name}"
            if name not in NO_METRICS and isinstance(value, int | float) and step not in self._known.get(key, ()):
                metrics.append(Metric(key, float(value), at, step))
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
        for metric in metrics:
            self._known.setdefault(metric.key, set()).add(step)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)

    def _run(self, folder: RunFolder, name: str | None, experiment: str, config: Record) -> str:
        """Return the id of the run's MLflow run, which its first attempt makes."""
        file = "mlflow.json"
        if folder.storage.exists(file) and (known := json.loads(folder.storage.read(file))).get("uri") == self.uri:
            return str(known["id"])
        found = self._client.get_experiment_by_name(experiment)
        group = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        made: Any = self._client.create_run(group, run_name=name)
        folder.storage.write(file, json.dumps({"id": made.info.run_id, "uri": self.uri}).encode())
        self._note(made.info.run_id, config)
        return str(made.info.run_id)

    def _note(self, run_id: str, config: Record) -> None:
        from mlflow.entities import Param

        values = [(key, str(value)[:LONGEST_VALUE]) for key, value in leaves(config) if value not in (None, [], {})]
        params = [Param(key.replace("[", ".").replace("]", ""), value) for key, value in values]
        for first in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(run_id, params=params[first : first + MOST_PARAMETERS])

    def _steps(self) -> dict[str, set[int]]:
        keys = self._client.get_run(self.run_id).data.metrics
        return {key: {each.step for each in self._client.get_metric_history(self.run_id, key)} for key in keys}


def _store_in(folder: RunFolder) -> str:
    local = folder.storage.path(MLFLOW)
    if local is None:
        raise ConfigError(
            f"MLflow keeps no store in {folder.url}: it is no disk; set MLFLOW_TRACKING_URI to a server or a path"
        )
    return local.resolve().as_uri()
