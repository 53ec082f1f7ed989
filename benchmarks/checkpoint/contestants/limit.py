"""The limits: one copy into kept memory; the bytes written and fsynced; the bytes read, with one pass of the digest."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from blake3 import blake3

from benchmarks.checkpoint.saver import State, serve

BLOCK = 8 * 2**20


class Limit:
    def __init__(self, state: State) -> None:
        self.buffer = torch.zeros(sum(value.nbytes for value in state.values()), dtype=torch.uint8)

    def save(self, state: State, folder: Path) -> Written:
        at = 0
        for value in state.values():
            self.buffer[at : at + value.nbytes].view(value.dtype).view(value.shape).copy_(value)
            at += value.nbytes
        return Written(memoryview(self.buffer.numpy()), folder / "bytes")

    def load(self, state: State, folder: Path) -> None:
        digest = blake3()
        with (folder / "bytes").open("rb", buffering=0) as file:
            for value in state.values():
                view = memoryview(value.view(-1).view(torch.uint8).numpy())
                for start in range(0, len(view), BLOCK):
                    block = view[start : start + BLOCK]
                    file.readinto(block)
                    digest.update(block)


class Written:
    def __init__(self, data: memoryview, path: Path) -> None:
        self.thread = threading.Thread(target=self.write, args=(data, path))
        self.thread.start()

    def write(self, data: memoryview, path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), BLOCK):
                file.write(data[start : start + BLOCK])
            os.fsync(file.fileno())

    def done(self) -> bool:
        return not self.thread.is_alive()

    def wait(self) -> None:
        self.thread.join()


if __name__ == "__main__":
    serve(Limit)
