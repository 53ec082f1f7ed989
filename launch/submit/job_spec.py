"""The program that the nodes of a job start, as recorded in the run folder."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config
from everstep.launch.submit.records import submissions
from everstep.launch.torchrun import trainer
from everstep.run_folder import CONFIG, JOB, RunFolder


@dataclass(frozen=True)
class Submitted:
    """The job and the program that torchrun starts for it on every node."""

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
    def read(folder: RunFolder) -> Submitted:
        """Read job.yaml and the newest submission; without a submission the program is the trainer.

        Raises:
            ConfigError: the folder is not a run folder.
        """
        job = _job(folder)
        if seen := submissions(folder):
            intent = seen[-1].intent
            return Submitted(job, tuple(intent["argv"]), intent.get("code"))
        if not folder.storage.exists(CONFIG):
            raise ConfigError(f"{folder.url} is not a run folder; write everstep submit job=slurm (or k8s) run=NAME …")
        return Submitted(job, tuple(trainer(folder.storage.url)))


def _job(folder: RunFolder) -> JobConfig:
    import yaml

    try:
        return job_config(yaml.safe_load(folder.storage.read(JOB)) or {})
    except FileNotFoundError:
        return JobConfig()
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder.url}/{JOB} is damaged: {str(error).splitlines()[0]}") from error
