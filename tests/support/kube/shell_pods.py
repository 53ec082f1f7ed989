"""Jobs on the simulated cluster whose pods are a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everstep.launch.config import JobConfig, job_config
from everstep.launch.schedulers.base import Program, Rendered
from everstep.launch.schedulers.job import JobHandle
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support.kube.cluster import Cluster
from support.processes import until

WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


def config(tmp_path: Path, shell: str = WAIT, **keys: Any) -> JobConfig:
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "train", "command": ["sh", "-c", shell]}]}}}}
    (tmp_path / "patch.yaml").write_text(json.dumps(patch))
    given = {"nodes": 2, "nproc": 1, "gpus": 0, "image": "i", **keys}
    return job_config({"scheduler": "k8s", **given, "k8s": {"overlay": str(tmp_path / "patch.yaml")}})


def rendered(job: JobConfig, token: str = "token-1") -> Rendered:
    return Kubernetes(job).render(
        job, Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), token, "steps: 5\n")
    )


def submitted(cluster: Cluster, job: JobConfig) -> tuple[Kubernetes, JobHandle]:
    scheduler = Kubernetes(job, retry_s=20)
    handle = scheduler.submit(rendered(job))
    until(lambda: len(cluster.pods(phase="Running")) == job.node_range[1])
    return scheduler, handle
