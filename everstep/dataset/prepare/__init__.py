"""Preparation of a dataset of Arrow shards from any source."""

from everstep.dataset.prepare.engine import (
    prepare,
    prepare_arrays,
    prepare_blocks,
    prepare_frame,
    prepare_rows,
    prepared,
)

__all__ = ["prepare", "prepare_arrays", "prepare_blocks", "prepare_frame", "prepare_rows", "prepared"]
