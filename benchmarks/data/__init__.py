"""How fast datasets are read, shuffled, resumed and written, beside a memory map and the peers."""

from benchmarks.data.command import main

__all__ = ["main"]
