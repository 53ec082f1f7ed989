"""Facts of an attempt that are known before anything is built. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.run_folder import RunFolder
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
