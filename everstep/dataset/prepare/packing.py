"""Packing of tokens into samples: one per document, or blocks of a fixed number from joined documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.prepare.tokenizers import Tokens
from everstep.dataset.shards import table_of

TOKENS = "tokens"


def ragged(tokens: Tokens, kind: np.dtype[Any]) -> pa.Array:
    """Return a column with the tokens of each document."""
    return pa.LargeListArray.from_arrays(tokens.offsets, pa.array(tokens.values.astype(kind, copy=False)))


class Packer:
    """Joins documents with a separator after each, and splits them into blocks of `width`.

    The rest stays in `tail` until more documents are added.
    """

    def __init__(self, width: int, separator: int, kind: np.dtype[Any]) -> None:
        self._width = width
        self._separator = separator
        self.tail: NDArray[Any] = np.empty(0, kind)

    def add(self, tokens: Tokens) -> pa.Table:
        """Add documents; return the blocks that are now full."""
        kind = self.tail.dtype
        joined = np.insert(tokens.values.astype(kind, copy=False), tokens.offsets[1:], kind.type(self._separator))
        return self.cut(joined)

    def cut(self, stream: NDArray[Any]) -> pa.Table:
        """Add tokens with their separators; return the blocks that are now full."""
        stream = np.concatenate([self.tail, stream])
        full = len(stream) // self._width * self._width
        self.tail = stream[full:].copy()
        return table_of({TOKENS: stream[:full].reshape(-1, self._width)})
