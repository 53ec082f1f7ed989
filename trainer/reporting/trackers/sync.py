"""`everstep sync RUN --to TRACKER`: write a run's metrics into a tracker; twice is the same as once."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from everstep.config import RunConfig
from everstep.errors import EverstepError
from everstep.frozen_config import plain, thaw
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.plugins import TARGET, instantiate
from everstep.trainer.reporting.sinks import Sink
from everstep.trainer.reporting.trackers.opening import check_installed, earlier
from everstep.trainer.reporting.trackers.tensorboard_sink import TensorBoardSink
from everstep.trainer.reporting.trackers.wandb_sink import WandbSink

TRACKERS = {
    "wandb": "W&B",
    "tensorboard": "TensorBoard",
    "mlflow": "everstep.sinks.MLflow",
    "trackio": "everstep.sinks.Trackio",
}
"""Choice of --to → the tracker."""


def add_parser(verbs: Any) -> None:
    """Add the verb, which the launcher calls with the address of a run folder."""
    parser = verbs.add_parser("sync", description=__doc__)
    parser.add_argument("run", metavar="RUN_URL")
    parser.add_argument("--to", required=True, choices=TRACKERS)
    parser.set_defaults(run_verb=sync)


def sync(options: argparse.Namespace) -> int:
    """Write the last record of each step of all attempts; the tracker leaves out what it has already."""
    folder = RunFolder(options.run)
    config = thaw(folder.storage.read(CONFIG))
    records = earlier(folder, config.steps)
    check_installed(TRACKERS[options.to])
    try:
        sink = open_tracker(options.to, folder, config, int(records[-1]["step"]) if records else 0)
        for record in records:
            sink.log(record)
        sink.close()
    except EverstepError:
        raise
    except Exception as error:
        raise EverstepError(f"--to {options.to}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    print(f"{len(records)} records of {config.run} are in {options.to}")
    return 0


def open_tracker(name: str, folder: RunFolder, config: RunConfig, last: int) -> Sink:
    """Open a tracker for the records up to step `last`, with the options that the run's config gives it."""
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", config.log.wandb.mode)
        return WandbSink(dataclasses.replace(config.log.wandb, mode=mode), config.run, folder, plain(config))
    if name == "tensorboard":
        return TensorBoardSink(folder, config.log.hparams, last)
    target = TRACKERS[name]
    node = next((node for node in config.log.sinks if node.get(TARGET) == target), {TARGET: target})
    sink: Sink = instantiate(node, "log.sinks", (), run=config.run, folder=folder, config=plain(config))
    return sink
