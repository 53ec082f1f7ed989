"""Lightning's AsyncCheckpointIO around its TorchCheckpointIO, and fsync."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from benchmarks.checkpoint.saver import State, serve, sync_all


class Durable(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        sync_all(Path(path).parent)
        self.saved.set_result(None)

    saved: Future[None]


class Lightning:
    def __init__(self, state: State) -> None:
        self.inner = Durable()
        self.io = AsyncCheckpointIO(self.inner)

    def save(self, state: State, folder: Path) -> Lightning:
        self.inner.saved = Future()
        self.io.save_checkpoint({"state_dict": state}, folder / "lightning.ckpt")
        return self

    def done(self) -> bool:
        return self.inner.saved.done()

    def wait(self) -> None:
        self.inner.saved.result()

    def load(self, state: State, folder: Path) -> None:
        for name, value in torch.load(folder / "lightning.ckpt", weights_only=True)["state_dict"].items():
            state[name].copy_(value)


if __name__ == "__main__":
    serve(Lightning)
