"""Helpers of tests: toys that are trained, servers, clusters, ways to die, and records of runs. `support.kube` is a
simulated Kubernetes, `support.slurm` a real Slurm of many nodes on this machine."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parent.parent
PATHS = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
"""PYTHONPATH of processes that import everstep, this package or the zoo."""
