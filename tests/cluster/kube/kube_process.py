"""The simulated cluster as a process of its own: `python kube_process.py FOLDER NODES SCALE`, until its input ends."""

from __future__ import annotations

import sys
from pathlib import Path

from kube_cluster import Cluster

if __name__ == "__main__":
    folder, nodes, scale = sys.argv[1:]
    with Cluster.up(Path(folder), int(nodes), float(scale)) as made:
        print(made.kubeconfig, flush=True)
        sys.stdin.read()
    sys.exit(f"{made.errors}" if made.errors else 0)
