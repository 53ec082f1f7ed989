"""litdata: chunks of 64 MB, StreamingDataset and its StreamingDataLoader; tokens by its TokensLoader."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from litdata.streaming.item_loader import TokensLoader

from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import BLOCK, Source


class Chunks:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        loader = TokensLoader(block_size=BLOCK) if kind == "tokens" else None
        data = litdata.StreamingDataset(str(folder), item_loader=loader, shuffle=True, drop_last=False, seed=0)
        collate = blocks if kind == "tokens" else list
        self.loader = litdata.StreamingDataLoader(data, batch_size=batch, num_workers=0, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        tokens = source.kind == "tokens"
        for name in ("CACHE", "DATA_CACHE"):
            # Folders that it would leave in /tmp.
            os.environ[f"DATA_OPTIMIZER_{name}_FOLDER"] = os.path.join(os.environ["BENCH_SCRATCH"], name)
        litdata.optimize(
            fn=Sample(source), inputs=list(range(len(source))), output_dir=str(folder), num_workers=1, verbose=False,
            chunk_bytes="64MB", item_loader=TokensLoader(block_size=BLOCK) if tokens else None,
        )  # fmt: skip


class Sample:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, number: int) -> Any:
        sample = self.source.sample(number)
        return torch.from_numpy(sample.copy()) if self.source.kind == "tokens" else sample.tobytes()


def blocks(samples: list[Any]) -> Any:
    if isinstance(samples[0], np.ndarray):
        return torch.from_numpy(np.stack(samples)).long()
    return torch.stack(samples).long()


if __name__ == "__main__":
    # It pickles the function by the name of its module.
    sys.modules["benchmarks.data.contestants.litdata_chunks"] = sys.modules["__main__"]
    serve(Chunks)
