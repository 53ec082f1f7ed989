"""torch.distributed.checkpoint, as it comes; its writer fsyncs."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp

from benchmarks.checkpoint.saver import Now, State, serve


class DcpSync:
    def __init__(self, state: State) -> None:
        warnings.simplefilter("ignore")

    def save(self, state: State, folder: Path) -> Now:
        dcp.save(dict(state), checkpoint_id=folder / "dcp", no_dist=True)
        return Now()

    def load(self, state: State, folder: Path) -> None:
        dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)


if __name__ == "__main__":
    serve(DcpSync)
