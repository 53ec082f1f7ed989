"""webdataset: tar files of 64 MB, shuffled by shard and in a buffer of 1,000; resumes by reading up to the place."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import SHARD_BYTES, Source

BUFFER = 1000


class Tar:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        whole = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        shuffled = whole.shuffle(BUFFER, rng=random.Random(0)).map(sample)
        self.data = shuffled.batched(batch, collation_fn=blocks if kind == "tokens" else list)
        self.taken = state or 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in islice(iter(self.data), self.taken, None):
            self.taken += 1
            yield batch

    def state(self) -> Any:
        return self.taken

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as out:
            for number in range(len(source)):
                out.write({"__key__": f"{number:09d}", "bin": source.sample(number).tobytes()})


def sample(item: Any) -> bytes:
    content: bytes = item["bin"]
    return content


def blocks(samples: list[bytes]) -> Any:
    return torch.from_numpy(np.stack([np.frombuffer(one, np.uint16) for one in samples])).long()


if __name__ == "__main__":
    serve(Tar)
