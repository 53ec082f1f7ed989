"""Real text without a download: the sources of Python's own standard library, about 11 MB."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator

from everstep.dataset.index import TRAIN, VALIDATION
from everstep.dataset.prepare import prepare_blocks, prepared
from everstep.errors import DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.dataset import Splits

HELD_OUT_EVERY = 20
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_corpus(path: str, block: int = 128) -> Splits:
    """Return the standard library's .py files without tests, as blocks of bytes.

    Every 20th file is held out. The dataset is prepared into folder `path` at the first use and reused afterwards.
    Batches have one column, `tokens`: uint8 [n, block + 1].
    """
    if not prepared(path):
        prepare_blocks(stdlib_sources(), path, block, validation_every=HELD_OUT_EVERY)
    train, validation = (ArrowDataset(os.path.join(path, split)) for split in (TRAIN, VALIDATION))
    there = train.index.columns["tokens"].shape[0]
    if there != block + 1:
        raise DataError(
            f"{path} was prepared with block={(there or 1) - 1}, not {block}; set data.path to another folder"
        )
    return Splits(train, validation)


def stdlib_sources() -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content) of every source file, sorted by path, so that all machines agree."""
    root = sysconfig.get_paths()["stdlib"]
    names = []
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED]
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files if file.endswith(".py")]
    for name in sorted(names):
        with open(os.path.join(root, name), "rb") as source:
            yield name, source.read()
