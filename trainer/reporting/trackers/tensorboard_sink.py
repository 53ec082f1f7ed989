"""TensorBoard as a sink."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from everstep.run_folder import RunFolder
from everstep.trainer.reporting.media_views import add_media
from everstep.trainer.reporting.sinks import NO_METRICS, Record


class TensorBoardSink:
    """TensorBoard's event files in the run folder.

    Records that an earlier attempt wrote of later steps are purged.
    """

    once = True

    def __init__(self, folder: RunFolder, hparams: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Open the writer; `step` is the one from which the run resumes."""
        from torch.utils.tensorboard import SummaryWriter

        local = folder.storage.path("tensorboard")
        place = str(local) if local is not None else f"{folder.url}/tensorboard"
        self._known = _steps(place, step) if step else {}
        """Tag → steps up to `step` that earlier attempts have written."""
        self._writer: Any = SummaryWriter(place, purge_step=step + 1)
        if hparams:
            self._begin_trial(hparams)

    def _begin_trial(self, hparams: Mapping[str, Any]) -> None:
        """Write the trial's hyperparameters.

        TensorBoard shows the last value of each metric beside them, so results need no further record. Its own
        `add_hparams` would make a separate run for that, without the curves.
        """
        from torch.utils.tensorboard import summary

        plain = int | float | str
        told = {key: value if isinstance(value, plain) else json.dumps(value) for key, value in hparams.items()}
        summaries: Any = summary.hparams  # has no type hints
        _, begin, _ = summaries(told, {})
        self._writer.file_writer.add_summary(begin)
        self._writer.flush()

    def log(self, record: Record) -> None:
        for key, value in record.items():
            tag, step = f"{record['kind']}/{key}", record["step"]
            if key not in NO_METRICS and isinstance(value, int | float) and step not in self._known.get(tag, ()):
                self._writer.add_scalar(tag, value, step, walltime=record.get("time"))
        self._writer.flush()

    def media(self, record: Record) -> None:
        add_media(self._writer, record)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _steps(place: str, last: int) -> dict[str, set[int]]:
    """Return the steps up to `last` of every tag in the event files of a folder."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(place, size_guidance={reader.SCALARS: 0})
    try:
        events.Reload()
    except reader.directory_watcher.DirectoryDeletedError:  # there is none yet
        return {}
    return {tag: {e.step for e in events.Scalars(tag) if e.step <= last} for tag in events.Tags()["scalars"]}
