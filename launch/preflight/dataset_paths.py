"""Dataset paths of a run, and those that exist only on its pods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from everstep.config import RunConfig
from everstep.launch.config import JobConfig


def datasets(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield key and path of each prepared dataset; other datasets have no known path."""
    node = run.data or {}
    if node.get("_target_") in ("everstep.data.prepared", "everstep.data.mixture"):
        mixed = [(f"data.mix[{n}].path", each.get("path")) for n, each in enumerate(node.get("mix") or [])]
        for key, path in [("data.path", node.get("path")), *mixed]:
            if path is not None:
                yield key, str(path)


def only_there(path: str, job: JobConfig) -> bool:
    """True if the path is on a volume claim that pods mount and that this machine does not have."""
    mounts = [Path(mount) for mount in job.k8s.claims.values()] if job.scheduler == "k8s" else []
    return any(Path(path).is_relative_to(mount) and not mount.exists() for mount in mounts)
