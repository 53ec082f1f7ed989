"""safetensors to one file, and fsync."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.checkpoint.saver import Now, State, serve, sync_all


class Safetensors:
    def __init__(self, state: State) -> None:
        pass

    def save(self, state: State, folder: Path) -> Now:
        save_file(state, folder / "state.safetensors")
        sync_all(folder)
        return Now()

    def load(self, state: State, folder: Path) -> None:
        for name, value in load_file(folder / "state.safetensors").items():
            state[name].copy_(value)


if __name__ == "__main__":
    serve(Safetensors)
