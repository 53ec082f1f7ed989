"""Writing: MB/s from samples in the page cache to files on the disk, each of them synced.

`memmap` is the raw bytes by NumPy, `arrow_file` the same Arrow files as Everstep's by pyarrow alone: what is left
between them and `everstep` is digests and the index.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.contest import chosen
from benchmarks.data.contest import CONTESTANTS, WRITTEN_BY, Field
from benchmarks.table import figures, machine, markdown, ratios, spread

HEAD = ("contestant", "n", "write, MB/s", "stored / samples", "max RSS, MB", "MB/s / memmap")


def measure(kind: str, size_mb: int, rounds: int, only: str, folder: Path) -> None:
    """Print one table."""
    contestants = chosen(only, [c.name for c in CONTESTANTS if c.name not in WRITTEN_BY], CONTESTANTS)
    field = Field(kind, size_mb, folder)
    payload = (field.folder / "source" / "values.bin").stat().st_size / 1e6
    seen = []
    for number in range(rounds):
        seen.append(field.attempt(contestants, "write"))
        told = "  ".join(f"{name} {one['write_mb_s']:.0f}" for name, one in seen[-1].items())
        print(f"round {number + 1}: {told}", flush=True)
    print(f"\nwriting {kind}, {field.samples:,} samples of {size_mb} MB, synced; {machine()}\n")
    columns = {
        key: [{n: one[key] for n, one in each.items()} for each in seen]
        for key in ("write_mb_s", "stored_mb", "rss_mb")
    }
    rows = []
    for name in (contestant.name for contestant in contestants):
        if name in field.absent:
            why = field.absent[name].splitlines()[-1][:80]
            rows.append([name, "0", f"not measured: {why}", *["–"] * (len(HEAD) - 3)])
            continue
        stored = [one / payload for one in figures(columns["stored_mb"], name)]
        rows.append([
            name, str(len(stored)), spread(figures(columns["write_mb_s"], name)), spread(stored[:1]),
            spread(figures(columns["rss_mb"], name), 4), spread(ratios(columns["write_mb_s"], name, "memmap")),
        ])  # fmt: skip
    print(markdown(HEAD, rows) + "\n", flush=True)
    for name, why in field.absent.items():
        print(f"{name}: {why}\n")
