"""The hand-written loop by somebody who knows of fused AdamW, which Everstep uses by default."""

from __future__ import annotations

from benchmarks.contestants.plain import main

if __name__ == "__main__":
    main(fused=True)
