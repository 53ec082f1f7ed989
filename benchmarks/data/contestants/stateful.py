"""torchdata's StatefulDataLoader over a memory map, a sample at a time, as its documentation has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import BLOCK, Source


class Blocks(Dataset):
    def __init__(self, folder: Path) -> None:
        self.blocks = np.asarray(np.memmap(folder / "values.bin", np.uint16, "r")).reshape(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.blocks[index].astype(np.int64))


class Strings(Dataset):
    def __init__(self, folder: Path) -> None:
        self.values = np.asarray(np.memmap(folder / "values.bin", dtype=np.uint8, mode="r"))
        self.offsets = np.load(folder / "offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.values[self.offsets[index] : self.offsets[index + 1]].tobytes()


class Stateful:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        torch.manual_seed(0)
        dataset, collate = self.dataset(folder, kind)
        self.loader = StatefulDataLoader(dataset, batch, shuffle=True, num_workers=0, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def dataset(self, folder: Path, kind: str) -> tuple[Any, Any]:
        return (Blocks(folder), default_collate) if kind == "tokens" else (Strings(folder), list)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        source.values.tofile(folder / "values.bin")
        np.save(folder / "offsets.npy", source.offsets)


if __name__ == "__main__":
    serve(Stateful)
