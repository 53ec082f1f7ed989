"""A job whose lost pod Kubernetes would let wait for long: resume puts a new job in its place, and nothing is lost."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import ledger_toy
import pytest
from kube_cluster import Cluster
from kube_run import Run
from process_helpers import until

from launch.schedulers.kubernetes.standing import IGNORED
from trainer.checkpoint.diff import differences
from trainer.checkpoint.restoring import locate

pytestmark = [pytest.mark.process, pytest.mark.cluster]
TRAINING = ("steps=40", "checkpoint.every=4", "data.pause_s=0.1", "parallel=ddp")


def note_failures(cluster: Cluster, pod: str, failures: int) -> None:
    """As if the pod's index had lost so many before it."""
    url = f"{cluster.server.url}/api/v1/namespaces/default/pods/{pod}"
    body = json.dumps({"metadata": {"annotations": {IGNORED: str(failures)}}}).encode()
    asked = urllib.request.Request(url, body, {"Content-Type": "application/merge-patch+json"}, method="PATCH")
    urllib.request.urlopen(asked, timeout=30).close()


@pytest.mark.timeout(300)
def test_resume_makes_a_new_job_where_the_old_one_would_wait_for_long(cluster: Cluster, tmp_path: Path) -> None:
    def resume(code: int = 0) -> str:
        return run.everstep("resume", "worn", "plugins=[toy,ledger_toy]", "--root", str(tmp_path), code=code)

    def status() -> str:
        return run.everstep("status", "worn", "--root", str(tmp_path))

    run = Run(cluster, tmp_path, "worn")
    run.submit("job.nodes=2", *TRAINING)
    run.wait_for_step(6)
    old = run.job
    assert "is training already" in resume(code=2)
    pod = run.pod(1)
    note_failures(cluster, pod["metadata"]["name"], 6)
    cluster.evict(pod)
    run.until(lambda: "pod 1: is started again only in" in status(), "word of the long wait")
    assert f"a new job takes the place of k8s://current/default/job/{old}" in resume()
    assert run.job != old
    run.wait()
    until(lambda: [each["metadata"]["name"] for each in cluster.store.list("jobs")] == [run.job])
    assert "a new job takes the place of" in status()
    undisturbed = Run(cluster, tmp_path, "undisturbed")
    undisturbed.everstep("run", *undisturbed.words(*TRAINING, "job=local", "job.nproc=2"))
    assert ledger_toy.slots(run.ledger) == ledger_toy.slots(undisturbed.ledger)
    assert list(differences(locate(run.folder.url), locate(undisturbed.folder.url))) == []
