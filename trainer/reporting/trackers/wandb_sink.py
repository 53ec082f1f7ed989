"""Weights & Biases as a sink, and the reader of its offline files."""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everstep.config import WandbConfig
from everstep.run_folder import RunFolder
from everstep.trainer.reporting.media_views import media_value
from everstep.trainer.reporting.sinks import NO_METRICS, Record

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

    once = True

    def __init__(self, options: WandbConfig, run: str | None, folder: RunFolder, config: Record) -> None:
        import wandb

        _leave_service_of_another_process()
        folder.storage.create("wandb.json", json.dumps({"id": uuid.uuid4().hex[:12]}).encode())
        identity = json.loads(folder.storage.read("wandb.json"))["id"]
        local = folder.storage.path()
        directory = os.environ.get("WANDB_DIR") or (str(local) if local is not None else None)
        written = last_steps(Path(directory or "."), identity)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            name=run,
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

    def media(self, record: Record) -> None:
        if record["step"] < self._first or record["step"] <= self._written.get("media", 0):
            return
        self._run.log({f"media/{record['name']}": media_value(record), "step": record["step"]}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _leave_service_of_another_process() -> None:
    """Have W&B start a service for this process, not use one that the environment names.

    Such a service keeps the W&B run of a killed attempt open, and refuses it to the next. A notebook with W&B open
    hands its own down to the run as `WANDB_SERVICE=3-PID-unix-PATH`.
    """
    service = os.environ.get("WANDB_SERVICE", "")
    if service and service.split("-")[1:2] != [str(os.getpid())]:
        del os.environ["WANDB_SERVICE"]


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
