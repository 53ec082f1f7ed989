"""torchsnapshot's asynchronous take, and fsync."""

from __future__ import annotations

from pathlib import Path

from torchsnapshot import Snapshot, StateDict

from benchmarks.checkpoint.saver import State, serve, sync_all


class Torchsnapshot:
    def __init__(self, state: State) -> None:
        pass

    def save(self, state: State, folder: Path) -> Torchsnapshot:
        self.folder = folder
        self.pending = Snapshot.async_take(str(folder / "snapshot"), {"state": StateDict(**state)})
        return self

    def done(self) -> bool:
        return bool(self.pending.done())

    def wait(self) -> None:
        self.pending.wait()
        sync_all(self.folder)

    def load(self, state: State, folder: Path) -> None:
        Snapshot(str(folder / "snapshot")).restore({"state": StateDict(**state)})


if __name__ == "__main__":
    serve(Torchsnapshot)
