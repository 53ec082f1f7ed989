"""Documents of different lengths without a download: pieces of the standard library, by package."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import numpy as np

from everstep.dataset.index import TRAIN, VALIDATION
from everstep.dataset.prepare import prepare_rows, prepared
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.collate import Pad
from everstep.trainer.data.dataset import Splits
from everstep.trainer.data.stdlib_corpus import stdlib_sources

LINES = 20
"""Lines of a document."""
HELD_OUT = 0.2
"""Fraction of the files that is held out."""
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "distutils", "email", "html", "http", "idlelib", "importlib",
    "json", "lib2to3", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml",
)  # fmt: skip
"""Packages of the standard library, each of which is a class; newer Python versions lack two of them."""
WORD = re.compile(r"[A-Za-z_]{2,}")


def stdlib_documents(path: str, max_length: int = 128) -> Splits:
    """Return pieces of 20 lines of the standard library, and the package that each is from.

    Every piece of a file is held out, or none. The dataset is prepared into folder `path` at the first use and reused
    afterwards. Batches have these columns:

    * `tokens`: int32 [n, longest of the microbatch], a hash of each word; the end of shorter documents is padding;
    * `lengths`: int64 [n], words of each document;
    * `label`: int64 [n], the package's place in PACKAGES;
    * `most_frequent`: int64 [n], the most frequent label, which is the guess of a trivial classifier.

    Args:
        max_length: words of a document that are used.
    """
    if not prepared(path):
        prepare_rows(_rows, path, validation=HELD_OUT, key="file", processes=1)
    columns = ("tokens", "label", "most_frequent")
    train, validation = (ArrowDataset(os.path.join(path, split), columns=columns) for split in (TRAIN, VALIDATION))
    return Splits(train, validation, collate=Pad(max_length=max_length))


def _rows() -> Iterator[dict[str, Any]]:
    documents = list(_documents())
    most_frequent = Counter(label for _, label, _ in documents).most_common(1)[0][0]
    for file, label, words in documents:
        tokens = np.array([crc32(word.encode()) >> 1 for word in words], np.int32)
        yield {"file": file, "tokens": tokens.tolist(), "label": label, "most_frequent": most_frequent}


def _documents() -> Iterator[tuple[str, int, list[str]]]:
    """Yield (file, label, words) of each piece that has a word."""
    for file, content in stdlib_sources():
        package = file.split(os.sep)[0]
        if package not in PACKAGES:
            continue
        lines = content.decode("utf-8", "replace").splitlines()
        for start in range(0, len(lines), LINES):
            words = WORD.findall("\n".join(lines[start : start + LINES]))
            if words:
                yield file, PACKAGES.index(package), words
