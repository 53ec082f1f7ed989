"""Opening of the sinks that a config asks for: W&B, TensorBoard, and those of `log.sinks`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from everstep.config import LogConfig
from everstep.errors import ConfigError
from everstep.run_folder import METRICS, RunFolder
from everstep.trainer.plugins import TARGET, prepare
from everstep.trainer.reporting.sinks import Guarded, JsonLines, Record, Sink, read_metrics
from everstep.trainer.reporting.trackers.sink_thread import SinkThread
from everstep.trainer.reporting.trackers.tensorboard_sink import TensorBoardSink
from everstep.trainer.reporting.trackers.wandb_sink import WandbSink

PACKAGES = {
    "W&B": ("wandb", "wandb"),
    "TensorBoard": ("torch.utils.tensorboard", "tensorboard"),
    "everstep.sinks.MLflow": ("mlflow", "mlflow"),
    "everstep.sinks.Trackio": ("trackio", "trackio"),
}
"""Tracker → module that it needs, and the extra of everstep that has it."""
KINDS = ("train", "evaluate")
"""Records of a run folder that trackers get, in the order in which a step writes them."""


def open_sinks(
    log: LogConfig,
    run: str | None,
    folder: RunFolder,
    attempt: int,
    config: Record,
    step: int = 0,
    plugins: Iterable[str] = (),
) -> list[Sink]:
    """Open the run's own metrics file, and the configured sinks, each on its own thread.

    Args:
        run: the run's name.
        config: the run's whole config, for trackers that show it.
        step: the one from which this attempt resumes.
        plugins: packages of the user that `log.sinks` may name.

    Raises:
        ConfigError: the package of a sink is not installed, or a node of `log.sinks` is wrong.
    """
    wanted = dict(_openers(log, run, folder, config, step, plugins))
    for name in wanted:
        check_installed(name.partition(" ")[2] or name)
    own = JsonLines(folder.storage, folder.attempt(attempt, METRICS))
    threads = [SinkThread(name, opener, lambda: earlier(folder, step)) for name, opener in wanted.items()]
    return [Guarded(METRICS, own), *threads]


def _openers(
    log: LogConfig, run: str | None, folder: RunFolder, config: Record, step: int, plugins: Iterable[str]
) -> Iterator[tuple[str, Callable[[], Sink]]]:
    if log.wandb.enabled:
        yield "W&B", lambda: WandbSink(log.wandb, run, folder, config)
    if log.tensorboard:
        yield "TensorBoard", lambda: TensorBoardSink(folder, log.hparams, step)
    for number, node in enumerate(log.sinks):
        key = f"log.sinks[{number}]"
        made = prepare(node, key, plugins, run=run, folder=folder, config=config, step=step, hparams=log.hparams)
        yield f"{key} {node[TARGET]}", partial(_checked, made, key)


def _checked(make: Callable[[], Any], key: str) -> Sink:
    sink = make()
    missing = [name for name in ("log", "close") if not callable(getattr(sink, name, None))]
    if missing:
        raise ConfigError(f"{key} gives a {type(sink).__name__}, which has no method {missing[0]!r}")
    found: Sink = sink
    return found


def check_installed(tracker: str) -> None:
    """Raise ConfigError if the package of one of our trackers is missing."""
    if tracker not in PACKAGES:
        return
    module, extra = PACKAGES[tracker]
    try:
        if module not in sys.modules or sys.modules[module] is None:
            importlib.import_module(module)
    except ImportError as error:
        name = tracker.rpartition(".")[2]
        raise ConfigError(f"log asks for {name}, which is not installed: pip install 'everstep[{extra}]'") from error


def earlier(folder: RunFolder, step: int) -> list[Record]:
    """Return the last record of each step up to `step` of all attempts, in the order of steps."""
    found = [record for kind in KINDS for record in read_metrics(folder, kind).values() if record["step"] <= step]
    return sorted(found, key=lambda record: int(record["step"]))
