"""From any source to a dataset of Arrow shards."""

from everstep.dataset.prepare.engine import (
    prepare,
    prepare_arrays,
    prepare_blocks,
    prepare_frame,
    prepare_rows,
    prepared,
)

__all__ = ["prepare", "prepare_arrays", "prepare_blocks", "prepare_frame", "prepare_rows", "prepared"]
