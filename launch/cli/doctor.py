"""`everstep doctor`: check that a cluster can take a job, by queries to it, and find stuck jobs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from everstep.compose import compose, compose_job
from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.schedulers.registry import scheduler

EXAMPLES = """examples:
  everstep doctor job=k8s                                      reach, permissions, what hangs
  everstep doctor job=k8s job.nodes=4 job.nproc=8 job.mem=512G also: room for such a job
  everstep doctor job=k8s --out-of-service NODE                a machine is off for good: give up its pods
  everstep doctor job=slurm job.nodes=16 job.partition=gpu

exit codes: 0 nothing is wrong, 2 something is; each line of it names the key to change
"""


def doctor(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_intermixed_args(arguments)
    job = _job(options.overrides, options.config_dir)
    found = _kubernetes(job, options.out_of_service) if job.scheduler == "k8s" else _other(job, options.out_of_service)
    wrong = False
    for line, fine in found:
        print(line, flush=True)
        wrong = wrong or not fine
    return ConfigError.exit_code if wrong else 0


def _job(words: Sequence[str], config_dirs: Sequence[str]) -> JobConfig:
    """Return the job config; without an experiment or task, only the job keys are composed."""
    trains = any(word.split("=")[0] in ("experiment", "task") for word in words)
    return job_config(compose(words, config_dirs).job if trains else compose_job(words, config_dirs).job)


def _kubernetes(job: JobConfig, lost_node: str | None) -> Iterator[tuple[str, bool]]:
    from everstep.launch.schedulers.kubernetes.doctor import Doctor

    asks = Doctor(job)
    if lost_node is not None:
        yield str(asks.take_out_of_service(lost_node)), True
        return
    for finding in asks.findings():
        yield str(finding), finding.fine is not False


def _other(job: JobConfig, lost_node: str | None) -> Iterator[tuple[str, bool]]:
    if lost_node is not None:
        raise ConfigError(f"--out-of-service {lost_node}: only Kubernetes keeps pods of lost nodes; say job=k8s")
    if job.scheduler == "local":
        raise ConfigError("job=local has no cluster to look at; choose one with job=k8s or job=slurm")
    problems = scheduler(job.scheduler, job).problems(job)
    yield from ((f"wrong  {problem}", False) for problem in problems)
    if not problems:
        yield f"ok     {job.scheduler} would take the job", True


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep doctor",
        description="Whether a cluster can take a job, and what hangs there. Nothing is changed, unless you say so.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser, "the words of a submission")
    parser.add_argument("--out-of-service", metavar="NODE", help="taint this lost node, whose machine is off for good")
    return parser
