"""Weights from a version of a registry: copied to each node and verified before anything reads them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from everstep.registry.address import is_address, version_at
from everstep.trainer.distributed.mesh import Mesh


@contextlib.contextmanager
def local_copy(url: str, mesh: Mesh) -> Iterator[str]:
    """Yield the path of a copy that is there on each node and is removed afterwards; another URL as it is.

    Raises:
        ConfigError: the address names no version with weights.
        DataError: a file is missing, or is not the one that was added.
    """
    if not is_address(url):
        yield url
        return
    name = mesh.decide(lambda: f"everstep-init-{uuid.uuid4().hex}")
    folder = Path(tempfile.gettempdir()) / name
    fetches = mesh.place.local_rank == 0

    def fetch() -> None:
        if fetches:
            models, version = version_at(url)
            models.fetch(version, folder)

    try:
        mesh.together(fetch)
        yield str(folder)
    finally:
        if fetches:
            shutil.rmtree(folder, ignore_errors=True)
