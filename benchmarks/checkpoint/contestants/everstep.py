"""Everstep's checkpointer, with the manifest, the digests and the commit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.checkpoint.saver import State, serve
from everstep.config import CheckpointConfig, RunConfig
from everstep.process_setup import keep_freed_memory
from everstep.rank_env import RankInfo
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import ManifestFacts
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import Progress, TrainState


class Everstep:
    """The tensors are parameters here; what is measured starts with the call that the training loop makes."""

    def __init__(self, state: State) -> None:
        keep_freed_memory()
        self.checkpoints: Checkpointer | None = None
        self.model = self._model(state)
        self.folder = RunFolder("/nowhere")
        self.checkpoints = self._checkpointer(self.model)
        self.checkpoints.preallocate()  # as the loop does after its first step

    def _model(self, state: State) -> nn.Module:
        model = nn.Module()
        for name, value in state.items():
            model.register_parameter(name, nn.Parameter(value))
        return model

    def _checkpointer(self, model: nn.Module) -> Checkpointer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = TrainState(model, optimizer, Progress(step=1))
        mesh = Mesh(RankInfo(), torch.device("cpu"))
        facts = ManifestFacts(1, RunConfig().global_batch, "single", config_digest="config", data_digest="data")
        return Checkpointer(CheckpointConfig(), facts, self.folder, mesh, state)

    def save(self, state: State, folder: Path) -> Everstep:
        assert self.checkpoints is not None
        run = RunFolder(str(folder))
        run.claim({})
        self.checkpoints.folder = self.checkpoints.retention.folder = run
        self.checkpoints.state.progress.step += 1
        self.checkpoints.save()
        return self

    def done(self) -> bool:
        assert self.checkpoints is not None
        self.checkpoints.poll()
        return self.checkpoints._pending is None

    def wait(self) -> None:
        assert self.checkpoints is not None
        assert self.checkpoints.finish()

    def load(self, state: State, folder: Path) -> None:
        self.folder = RunFolder(str(folder))
        checkpoints = self._checkpointer(self._model(state))
        assert checkpoints.restore() is not None


if __name__ == "__main__":
    serve(Everstep)
