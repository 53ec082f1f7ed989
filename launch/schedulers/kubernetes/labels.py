"""Names and labels of the objects of a job in a cluster."""

from __future__ import annotations

import hashlib
import re

from everstep.launch.schedulers.base import Program

MANAGER = "everstep"
"""Field manager of applied objects, and the value of app.kubernetes.io/managed-by."""
TOKEN = "everstep.dev/token"
RUN = "everstep.dev/run"
FOLDER = "everstep.dev/folder"
JOB_NAME = "job-name"
"""Label that Kubernetes sets on the pods of a Job."""
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
CONTAINER = "train"
NODES = "node"
"""Name of the group of pods in a JobSet or TrainJob, as in Kubeflow's runtimes."""
PORT = 29400
LONGEST_RUN = 40
"""Letters for the run's name, of 63: `-DIGEST`, `-node-0` of a JobSet and `-INDEX` follow it."""


def job_name(program: Program) -> str:
    """Return one name per submission: the API server itself then refuses a second job for it."""
    digest = hashlib.sha256(f"{program.token} {program.folder}".encode()).hexdigest()[:8]
    return f"{slug(program.name)[:LONGEST_RUN].rstrip('-')}-{digest}"


def token_secret(job: str) -> str:
    """Return the name of the Secret with the token of a job."""
    return f"{job}-token"


def slug(text: str) -> str:
    """Return the text as a Kubernetes name: lower-case letters, digits and '-', a letter first."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")


def token_label(token: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", token).strip("-")[:63]


def labels(program: Program) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": MANAGER,
        RUN: slug(program.name)[:63].rstrip("-"),
        TOKEN: token_label(program.token),
    }
