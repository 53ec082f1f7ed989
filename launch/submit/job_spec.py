"""What the nodes of a job are to start, as the run folder says it."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config
from everstep.launch.submit.records import submissions
from everstep.launch.torchrun import trainer
from everstep.run_folder import CONFIG, JOB, RunFolder


@dataclass(frozen=True)
class Submitted:
    """The job, and what torchrun starts for it on every node."""

    job: JobConfig
    argv: tuple[str, ...]
    """A script, or a module after -m, with its arguments."""
    code: str | None = None
    """The snapshot of the code that was submitted (see launch/submit/snapshot.py); None is what the nodes find."""

    @property
    def is_trainer(self) -> bool:
        """Our own trainer, which says in the run folder how it ended; another program only has an exit code."""
        return self.argv[:2] == ("-m", "everstep.trainer")

    @staticmethod
    def read(folder: RunFolder) -> Submitted:
        """job.yaml and the newest submission; a run that was never submitted is trained as its config.yaml says.

        ConfigError when the folder is not a run's.
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
