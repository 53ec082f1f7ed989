"""The program that the nodes of a job start, as recorded in the run folder or mounted into a pod."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep import frozen_yaml
from everstep.checked_json import mapping
from everstep.config import Access
from everstep.errors import ConfigError
from everstep.frozen_config import thaw
from everstep.launch.config import JobConfig, job_config
from everstep.launch.schedulers.base import spec_digest
from everstep.launch.submit.submission import submissions
from everstep.launch.submit.trust import Runnable, refuse_foreign
from everstep.launch.torchrun import trainer
from everstep.run_folder import CONFIG, JOB, SUBMISSIONS, RunFolder
from everstep.security.access import make_folder


@dataclass(frozen=True)
class JobSpec:
    """The job and the program that it runs on every node."""

    job: JobConfig
    argv: tuple[str, ...]
    """A script, or a module after -m, with its arguments."""
    code: str | None = None
    """Snapshot of the submitted code (see launch/submit/snapshot.py); None uses the code on the nodes."""

    @property
    def is_trainer(self) -> bool:
        """True for the everstep trainer, which records its outcome; another program has only an exit code."""
        return self.argv[:2] == ("-m", "everstep.trainer")

    @staticmethod
    def read(folder: RunFolder) -> JobSpec:
        """Read job.yaml and the newest submission; without a submission the program is the trainer.

        Raises:
            ConfigError: the folder is not a run folder.
        """
        job = _job(folder)
        if seen := submissions(folder):
            intent = seen[-1].intent
            return JobSpec(job, tuple(intent["argv"]), intent.get("code"))
        if not folder.storage.exists(CONFIG):
            raise ConfigError(f"{folder.url} is not a run folder; write everstep submit job=slurm (or k8s) run=NAME …")
        return JobSpec(job, tuple(trainer(folder.storage.url)))

    @staticmethod
    def submitted(folder: RunFolder, spec: str | None) -> JobSpec:
        """Read as `read` does, and check that the folder holds what was submitted.

        Args:
            spec: digest among the arguments of the job; None for a job that a user submits by hand: this user must
                then have written the folder.

        Raises:
            ConfigError: the folder was changed after the submission, or another user wrote it.
        """
        found = JobSpec.read(folder)
        if spec is not None and spec_digest(found.job, found.argv, found.code) != spec:
            raise ConfigError(
                f"{folder.url}: job.yaml or the newest submission is not what was submitted; "
                "see who can write there, and submit again"
            )
        if spec is None:
            argv = () if found.is_trainer else found.argv
            recorded = Runnable.of(found.job, found.plugins, found.code, argv)
            fix = f"start it with everstep resume {folder.url} --trust"
            refuse_foreign(folder.storage, recorded, recorded, Runnable(), fix=fix)
        return found

    @property
    def plugins(self) -> list[str]:
        """Packages that the trainer may import, as its arguments name them."""
        words = list(self.argv)
        return words[words.index("--plugins") + 1].split(",") if self.is_trainer and "--plugins" in words else []


def _job(folder: RunFolder) -> JobConfig:
    try:
        return job_config(read_job(folder))
    except FileNotFoundError:
        return JobConfig()


def read_job(folder: RunFolder) -> dict[str, Any]:
    """Return the content of job.yaml.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is damaged, or no launcher can have written it.
    """
    try:
        return mapping(frozen_yaml.read(folder.storage.read(JOB), JOB) or {}, JOB)
    except ValueError as error:
        raise ConfigError(f"{folder.url}: {error}") from error


SETTINGS = "EVERSTEP_SETTINGS"
"""Environment variable: folder where the settings are mounted."""
PROGRAM = "program.json"


def settle(folder: RunFolder, environment: Mapping[str, str]) -> None:
    """Copy the mounted settings into the run folder; existing files, as of a later submission, stay."""
    mounted = Path(environment.get(SETTINGS, ""))
    if SETTINGS not in environment or not (mounted / PROGRAM).is_file():
        return
    config = mounted / CONFIG
    make_folder(folder.storage, thaw(config.read_text()).access if config.is_file() else Access.private)
    for name in (CONFIG, JOB):
        if (mounted / name).is_file() and not folder.storage.exists(name):
            folder.storage.create(name, (mounted / name).read_bytes())
    if not folder.storage.names(SUBMISSIONS):
        # Without a handle: a launcher that needs it finds the job by its token.
        program = json.loads((mounted / PROGRAM).read_text())
        facts = {
            "scheduler": "k8s",
            "token": program["token"],
            "argv": program["argv"],
            "code": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        folder.storage.create(f"{SUBMISSIONS}/0001.json", (json.dumps(facts) + "\n").encode())
