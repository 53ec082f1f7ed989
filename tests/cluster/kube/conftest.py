"""What all tests on the simulated cluster share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.kube.cluster import Cluster

# The simulation has none of other people's controllers.
collect_ignore = [] if os.environ.get("EVERSTEP_KUBECONFIG") else ["test_kube_extensions.py"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes, 50 times as fast as real ones; what asks Kubernetes here asks this one."""
    with Cluster.up(tmp_path, 3, scale=0.02) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made
    assert made.errors == []
