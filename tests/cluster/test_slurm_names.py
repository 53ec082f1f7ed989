"""A folder full of files that are named as Everstep's is submitted to a real Slurm as any other is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from everstep.outcome import Outcome
from support import TESTS
from support.slurm.cluster import Cluster
from support.slurm.jobs import Job
from support.users_project import BUILT_IN, OWN, TRAP, lay_out

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
WORDS = ("job=slurm", "job.nproc=1", "job.gpus=0", "job.flags=[--exclusive,--hold]", "job.time=1h")


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Both are submitted, the user's files change, and then they may start."""
    project = lay_out(tmp_path_factory.mktemp("project"))
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    made = {"own": OWN, "built_in": BUILT_IN}
    jobs = {name: Job(cluster, project / "runs", name) for name in made}
    for name, words in made.items():
        # On the path: an editable install comes after a folder `everstep` of the user's, a real one before it.
        path = {"PYTHONPATH": str(TESTS.parent)}
        jobs[name].everstep("submit", *WORDS, *words, f"run={name}", where=project, env=path)
    for name in ("trainer.py", "mine.py"):
        (project / name).write_text(TRAP)
    for job in jobs.values():
        cluster.run("scontrol", "release", job.id)
    yield jobs
    for job in jobs.values():
        cluster.output("scancel", job.id)


@pytest.mark.parametrize("name", ["own", "built_in"])
def test_a_job_trains_to_its_end_from_the_code_that_was_submitted(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    job.wait()
    ending = job.folder.last_ending()
    assert ending is not None
    assert (ending.outcome, ending.step, job.causes()) == (Outcome.done, 4, ["done"]), job.printed()
