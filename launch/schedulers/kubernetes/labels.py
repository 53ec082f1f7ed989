"""Names and labels of all that a job makes in a cluster."""

from __future__ import annotations

import hashlib
import re

from everstep.launch.schedulers.base import Program

MANAGER = "everstep"
"""Field manager of what we apply, and the value of app.kubernetes.io/managed-by."""
TOKEN = "everstep.dev/token"
RUN = "everstep.dev/run"
FOLDER = "everstep.dev/folder"
JOB_NAME = "job-name"
"""Set by Kubernetes on the pods of a Job."""
JOBSET_NAME = "jobset.sigs.k8s.io/jobset-name"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
CONTAINER = "train"
NODES = "node"
"""The group of pods inside of a JobSet or TrainJob; Kubeflow's runtimes call it so."""
PORT = 29400
LONGEST_RUN = 40
"""Of a name's 63 letters, what is left for the run's: `-DIGEST`, `-node-0` of a JobSet and `-INDEX` come behind."""


def job_name(program: Program) -> str:
    """One name for one submission: the API server itself then refuses a second job for it."""
    digest = hashlib.sha256(f"{program.token} {program.folder}".encode()).hexdigest()[:8]
    return f"{slug(program.name)[:LONGEST_RUN].rstrip('-')}-{digest}"


def slug(text: str) -> str:
    """The text as Kubernetes has names: lower-case letters, digits and '-', a letter first."""
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
