"""MosaicML streaming: MDS shards of 64 MB, StreamingDataset and its StreamingDataLoader."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from benchmarks.data.reader import Batch, serve
from benchmarks.data.source import BLOCK, SHARD_BYTES, Source


def _without_torchvision() -> None:
    """streaming imports torchvision for image datasets that nobody here uses, and its usual build needs CUDA."""
    # It asks itself whether there is torchvision, so it comes first.
    import transformers.feature_extraction_utils  # noqa: F401

    for name, attribute in (("", ""), (".datasets", "VisionDataset"), (".transforms.functional", "to_tensor")):
        module = ModuleType(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        setattr(module, attribute or "__path__", object if attribute else [])
        sys.modules[module.__name__] = module
    sys.modules["torchvision.transforms"] = sys.modules["torchvision"]


_without_torchvision()

import streaming  # noqa: E402  # after what it imports


class Mds:
    def __init__(self, folder: Path, kind: str, batch: int, state: Any) -> None:
        streaming.base.util.clean_stale_shared_memory()
        data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
        # The loader guesses the batch size from the batch: of a list it would take the length of the first sample.
        collate = blocks if kind == "tokens" else strings
        self.loader = streaming.StreamingDataLoader(data, batch_size=batch, num_workers=0, collate_fn=collate)
        if state is not None:
            self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return (batch["sample"] for batch in self.loader)

    def state(self) -> Any:
        return self.loader.state_dict()

    @staticmethod
    def write(source: Source, folder: Path) -> None:
        encoding = f"ndarray:uint16:{BLOCK}" if source.kind == "tokens" else "bytes"
        with streaming.MDSWriter(out=str(folder), columns={"sample": encoding}, size_limit=SHARD_BYTES) as out:
            for number in range(len(source)):
                sample = source.sample(number)
                out.write({"sample": sample if source.kind == "tokens" else sample.tobytes()})


def blocks(samples: list[Any]) -> Any:
    return {"sample": torch.from_numpy(np.stack([sample["sample"] for sample in samples])).long()}


def strings(samples: list[Any]) -> Any:
    return {"sample": [sample["sample"] for sample in samples]}


if __name__ == "__main__":
    serve(Mds)
