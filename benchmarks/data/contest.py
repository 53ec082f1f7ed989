"""Who takes part in reading and writing datasets, and one phase of one of them in a process of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import ROOT, Contestant, FailedError, MissingError, run
from benchmarks.data import source

PEERS_PYTHON = os.environ.get("BENCH_DATA_PEERS_PYTHON", str(ROOT / ".venv-peers-data/bin/python"))
NAMES = (
    ("memmap", None),
    ("memmap_plain", None),
    ("everstep", None),
    ("stateful", "torchdata"),
    ("stateful_batched", "torchdata"),
    ("litdata_chunks", "litdata"),
    ("mds", "streaming"),
    ("webdataset_tar", "webdataset"),
    ("hf_map", "datasets"),
    ("hf_iter", "datasets"),
    ("arrow_file", None),
)
CONTESTANTS = tuple(Contestant(name, package, "benchmarks.data.contestants", PEERS_PYTHON) for name, package in NAMES)
WRITES_ALONE = ("arrow_file",)
WRITTEN_BY = {"memmap_plain": "memmap", "stateful": "memmap", "stateful_batched": "memmap", "hf_iter": "hf_map"}
"""Contestants that read what another one stores."""


class Field:
    """One kind of data in a folder, and the contestants in it."""

    def __init__(self, kind: str, size_mb: int, folder: Path) -> None:
        self.kind = kind
        self.folder = folder / f"{kind}-{size_mb}"
        if not (self.folder / "source" / "offsets.npy").exists():
            source.make(kind, size_mb, self.folder / "source")
        self.samples = len(np.load(self.folder / "source" / "offsets.npy")) - 1
        self.absent: dict[str, str] = {}
        """Why a contestant has no figures."""

    def run(self, contestant: Contestant, phase: str, **settings: object) -> dict[str, Any]:
        """What benchmarks/data/reader.py says of one phase."""
        contestant.check()
        common = {
            "PHASE": phase,
            "KIND": self.kind,
            "SAMPLES": self.samples,
            "SOURCE": self.folder / "source",
            "FOLDER": self.stored(contestant),
            "STATE": self.folder / f"{contestant.name}.state",
        }
        return run(contestant.argv(1), {**common, **settings})

    def stored(self, contestant: Contestant) -> Path:
        return self.folder / WRITTEN_BY.get(contestant.name, contestant.name)

    def write(self, contestant: Contestant) -> dict[str, Any]:
        """Store the samples anew."""
        shutil.rmtree(self.stored(contestant), ignore_errors=True)
        self.stored(contestant).mkdir(parents=True)
        return self.run(contestant, "write")

    def attempt(self, contestants: Sequence[Contestant], phase: str, **settings: object) -> dict[str, dict[str, Any]]:
        """One phase of each in turn; who fails takes part no more."""
        seen = {}
        for contestant in contestants:
            if contestant.name in self.absent:
                continue
            try:
                seen[contestant.name] = (
                    self.write(contestant) if phase == "write" else self.run(contestant, phase, **settings)
                )
            except (MissingError, FailedError) as error:
                self.absent[contestant.name] = f"{phase}: {error}"
        return seen
