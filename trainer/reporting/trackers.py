"""Experiment trackers beside the JSON lines: W&B and TensorBoard."""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from everstep.config import LogConfig, WandbConfig
from everstep.errors import ConfigError
from everstep.run_folder import METRICS, RunFolder
from everstep.trainer.reporting.sinks import NO_METRICS, Guarded, JsonLines, Record, Sink, warn

BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_MAGIC_BYTES = 7


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics in one file."""
    from wandb.proto import wandb_internal_pb2

    for content in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def last_steps(folder: Path, identity: str) -> dict[str, int]:
    """Return, by kind of record (train, evaluate), the highest step in the files of a run below `folder`."""
    last: dict[str, int] = {}
    for file in sorted(folder.glob(f"wandb/*/run-{identity}.wandb")):
        for row in rows(file):
            for kind in {name.partition("/")[0] for name in row if "/" in name}:
                last[kind] = max(last.get(kind, 0), int(row.get("step", 0)))
    return last


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the whole records of a file, without one truncated at its end."""
    place, whole = _MAGIC_BYTES, b""
    while place + _HEADER.size <= len(data):
        if (left := BLOCK - place % BLOCK) < _HEADER.size:
            place += left
            continue
        _, length, part = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        if part not in (_FULL, _FIRST, _MIDDLE, _LAST) or place + length > len(data):
            return
        whole = data[place : place + length] if part in (_FULL, _FIRST) else whole + data[place : place + length]
        place += length
        if part in (_FULL, _LAST):
            yield whole


class WandbSink:
    """Weights & Biases: all attempts of a run write to one W&B run, each step once.

    The W&B step is the run's step. A replayed step has the same values, and W&B cannot remove a step, so the record of
    an earlier attempt is kept.
    """

    def __init__(self, options: WandbConfig, name: str | None, folder: RunFolder, config: Record) -> None:
        import wandb

        folder.storage.create("wandb.json", json.dumps({"id": uuid.uuid4().hex[:12]}).encode())
        identity = json.loads(folder.storage.read("wandb.json"))["id"]
        local = folder.storage.path()
        directory = os.environ.get("WANDB_DIR") or (str(local) if local is not None else None)
        written = last_steps(Path(directory or "."), identity)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            name=name,
            id=identity,
            resume="allow",
            config=dict(config),
            mode=options.mode,  # type: ignore[arg-type]
            dir=directory,
            settings=_settings(),
        )
        self._run.define_metric("*", step_metric="step")
        self._written = written if self._run.offline else {}
        self._first = self._run.starting_step
        """Online, W&B itself reports the next step."""

    def log(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        if step < self._first or step <= self._written.get(kind, 0):
            return
        values = {f"{kind}/{k}": v for k, v in record.items() if k not in NO_METRICS}
        self._run.log({**values, "step": step}, step=step)

    def close(self) -> None:
        self._run.finish()


def _settings() -> Any:
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        x_disable_stats=True,
        disable_git=True,
        disable_code=True,
        finish_timeout=30,
        # The default of 15 s would lose that much when the process is killed.
        x_transaction_log_flush_interval=1,
    )


class TensorBoardSink:
    """TensorBoard's event files in the run folder.

    Records that an earlier attempt wrote of later steps are purged.
    """

    def __init__(self, folder: RunFolder, hparams: Mapping[str, Any] | None = None, step: int = 0) -> None:
        """Open the writer; `step` is the one from which the run resumes."""
        from torch.utils.tensorboard import SummaryWriter

        local = folder.storage.path("tensorboard")
        place = str(local) if local is not None else f"{folder.url}/tensorboard"
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
            if key not in NO_METRICS and isinstance(value, int | float):
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def open_sinks(
    log: LogConfig, name: str | None, folder: RunFolder, attempt: int, config: Record, step: int = 0
) -> list[Sink]:
    """Open the run's own metrics file and the sinks that `log` configures.

    A sink that cannot be opened is left out with a warning.

    Args:
        name: the run's name, for W&B.
        config: the run's whole config, for W&B.
        step: the one from which this attempt resumes.

    Raises:
        ConfigError: the package of a sink is not installed.
    """
    own = JsonLines(folder.storage, folder.attempt(attempt, METRICS))
    sinks: list[Sink] = [Guarded(METRICS, own)]
    wanted: dict[str, tuple[bool, str, Callable[[], Sink]]] = {
        "W&B": (log.wandb.enabled, "wandb", lambda: WandbSink(log.wandb, name, folder, config)),
        "TensorBoard": (log.tensorboard, "tensorboard", lambda: TensorBoardSink(folder, log.hparams, step)),
    }
    for tracker, (enabled, extra, opener) in wanted.items():
        if not enabled:
            continue
        try:
            sinks.append(Guarded(tracker, opener()))
        except ImportError as error:
            raise ConfigError(
                f"log asks for {tracker}, which is not installed: pip install 'everstep[{extra}]'"
            ) from error
        except Exception as error:
            warn(f"{tracker} cannot be used, training goes on without: {type(error).__name__}: {error}")
    return sinks
