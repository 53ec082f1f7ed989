"""`torch.save` to one file, and fsync."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.checkpoint.saver import Now, State, serve, sync_all


class TorchSave:
    def __init__(self, state: State) -> None:
        pass

    def save(self, state: State, folder: Path) -> Now:
        torch.save(state, folder / "state.pt")
        sync_all(folder)
        return Now()

    def load(self, state: State, folder: Path) -> None:
        for name, value in torch.load(folder / "state.pt", weights_only=True).items():
            state[name].copy_(value)


if __name__ == "__main__":
    serve(TorchSave)
