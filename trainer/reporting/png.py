"""Writer of PNG pictures, on the standard library alone."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB = 0, 2
"""Types of colour."""
LEVEL = 3
"""Effort of zlib: higher ones make photographs little smaller and take longer."""


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the PNG file of (height, width) grey values, or (height, width, 3) colours."""
    height, width = pixels.shape[:2]
    colour = GREY if pixels.ndim == 2 else RGB
    lines: NDArray[Any] = np.ascontiguousarray(pixels).reshape(height, -1)
    filtered = np.zeros((height, 1 + lines.shape[1]), np.uint8)  # each line begins with its filter: none
    filtered[:, 1:] = lines
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), LEVEL)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
