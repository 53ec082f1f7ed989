"""Facts of an attempt that are known before anything is built. Torch-free."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from everstep import compose, frozen_config
from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.reporting.node_recorder import NodeRecorder
from everstep.trainer.reporting.startup_timing import StartupTimer


@dataclass(frozen=True)
class Start:
    """Facts of this attempt that are known before anything is built."""

    folder: RunFolder
    attempt: int
    laps: StartupTimer
    micro_batch: int | None = None
    """The microbatch that the previous attempt asked for when it ran out of memory."""
    recorder: NodeRecorder | None = None
    """Recorder of the figures of this rank's node."""


def checked_config(text: str | bytes, options: argparse.Namespace, sent: bool = False) -> RunConfig:
    """Parse and check the config, also where rank 0 has sent it: other processes may write to the store.

    Args:
        sent: True if this rank has received it from rank 0.

    Raises:
        ConfigError: the config names packages that the command line does not, or has another digest.
    """
    run = frozen_config.thaw(text)
    if not options.frozen:
        if sent and run.plugins != compose.compose(options.overrides, options.config_dir).run.plugins:
            raise ConfigError(
                f"plugins={run.plugins}: the config of rank 0 names other packages than this rank's; "
                "give all ranks the same command line"
            )
        return run
    allowed = [name for name in options.plugins.split(",") if name]
    if refused := sorted(set(run.plugins) - set(allowed)):
        raise ConfigError(
            f"the run uses packages that were not named on the command line ({', '.join(refused)}); "
            f"if you trust them, add --plugins {','.join([*allowed, *refused])}"
        )
    if options.config_digest not in (None, frozen_config.start_digest(run)):
        raise ConfigError(
            f"{options.frozen}/{CONFIG} is not the config of this start: it was changed afterwards; "
            "see who can write there, and start again"
        )
    return run
