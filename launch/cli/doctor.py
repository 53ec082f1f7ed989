"""`everstep doctor`: check this machine, or that a cluster can take a job, and find stuck jobs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from everstep.compose import compose, compose_job
from everstep.errors import ConfigError
from everstep.launch.config import JobConfig, job_config
from everstep.launch.finding import Finding
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.schedulers.registry import scheduler

EXAMPLES = """examples:
  everstep doctor                                              this machine: versions, limits, storage, links
  everstep doctor run_root=s3://bucket/runs                    also: rate and promises of that store
  everstep doctor job=k8s                                      reach, permissions, what hangs
  everstep doctor job=k8s job.nodes=4 job.nproc=8 job.mem=512G also: room for such a job
  everstep doctor job=k8s --out-of-service NODE                a machine is off for good: give up its pods
  everstep doctor job=slurm job.nodes=16 job.partition=gpu

Each line is ok, warn or fail; exit code 2 if one is fail.
"""


def doctor(arguments: Sequence[str]) -> int:
    """Run the verb."""
    options = _parser().parse_intermixed_args(arguments)
    job, run_root = _asked(options.overrides, options.config_dir)
    found: list[Finding] = []
    for finding in _findings(job, run_root, options.out_of_service):
        found.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([finding.plain() for finding in found], indent=1))
    return ConfigError.exit_code if any(finding.fine is False for finding in found) else 0


def _asked(words: Sequence[str], config_dirs: Sequence[str]) -> tuple[JobConfig, str]:
    """Return the job and `run_root`; without an experiment or task, only the job keys are composed."""
    if any(word.split("=")[0] in ("experiment", "task") for word in words):
        composed = compose(words, config_dirs)
        return job_config(composed.job), composed.run.run_root
    alone = compose_job(words, config_dirs)
    return job_config(alone.job), alone.run_root


def _findings(job: JobConfig, run_root: str, lost_node: str | None) -> Iterator[Finding]:
    if job.scheduler == "k8s":
        yield from _kubernetes(job, lost_node)
        return
    if lost_node is not None:
        raise ConfigError(f"--out-of-service {lost_node}: only Kubernetes keeps pods of lost nodes; say job=k8s")
    if job.scheduler == "local":
        from everstep.launch.node.machine import findings

        yield from findings(job, run_root)
        return
    problems = scheduler(job.scheduler, job).problems(job)
    yield from (Finding(job.scheduler, problem, False) for problem in problems)
    if not problems:
        yield Finding(job.scheduler, "would take the job")


def _kubernetes(job: JobConfig, lost_node: str | None) -> Iterator[Finding]:
    from everstep.launch.schedulers.kubernetes.doctor import Doctor

    asks = Doctor(job)
    if lost_node is not None:
        yield asks.take_out_of_service(lost_node)
    else:
        yield from asks.findings()


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep doctor",
        description="Check this machine, or with job=slurm|k8s a cluster. Nothing is changed, unless you say so.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser, "the words of a submission")
    parser.add_argument("--out-of-service", metavar="NODE", help="taint this lost node, whose machine is off for good")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    return parser
