"""One Slurm for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.slurm.cluster import Cluster, missing

NODES, APART = 26, 3


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    made = Cluster.up(NODES, apart=APART)
    yield made
    made.down()
