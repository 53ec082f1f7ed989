"""What all tests on the simulated cluster share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parent.parent, Path(__file__).parent.parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from kube_cluster import Cluster  # noqa: E402

# The simulation has none of other people's controllers.
collect_ignore = [] if os.environ.get("EVERSTEP_KUBECONFIG") else ["test_kube_extensions.py"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes, 50 times as fast as real ones; what asks Kubernetes here asks this one."""
    with Cluster.up(tmp_path, 3, scale=0.02) as made:
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        yield made
    assert made.errors == []
