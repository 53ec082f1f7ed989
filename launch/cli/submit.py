"""`everstep submit`: compose, settle the config in the run folder, and submit a job; returns at once."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everstep.compose import Composed, compose, compose_job, with_name
from everstep.config import Access, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import changes_since, freeze, settle, start_digest, thaw, with_requests_of
from everstep.launch.config import JobConfig, job_config, job_yaml
from everstep.launch.console import say
from everstep.launch.parser import Arguments, add_overrides, split
from everstep.launch.preflight.checks import check, program_problems, refuse
from everstep.launch.preflight.model import rehearse, worlds
from everstep.launch.schedulers.base import Program, Scheduler
from everstep.launch.schedulers.job import new_token, token_by_hand
from everstep.launch.schedulers.registry import scheduler
from everstep.launch.submit.submission import Receipt, current
from everstep.launch.submit.submission import submit as submit_once
from everstep.launch.torchrun import trainer
from everstep.run_folder import CONFIG, RunFolder
from everstep.security.access import make_folder
from everstep.security.secret_detection import refuse_secrets

EXAMPLES = """examples:
  everstep submit job=slurm job.nodes=4 job.nproc=8 job.time=24h experiment=gpt_stdlib
  everstep submit job=slurm job.nodes=2:4 job.time=24h experiment=mine --config-dir conf plugins=[my_package]
  everstep submit job=slurm job.nodes=2 job.nproc=8 -- train_my_way.py --any --flags
  everstep submit --dry-run job=slurm experiment=digits       the exact script, flags and config; nothing is written

Before anything is written, all of 'everstep check' is looked at: model and data too, which takes some seconds.
The same command again makes no second job: it names the one that is queued or running, or goes on when that is over.
"""


@dataclass(frozen=True)
class Plan:
    """Complete description of a submission."""

    folder: RunFolder
    job: JobConfig
    program: Program
    composed: Composed | None = None
    """None for a program other than the trainer."""
    access: Access = Access.private
    """Users who may read the folder, for a program other than the trainer; a config has its own `access`."""

    @property
    def config(self) -> RunConfig | None:
        return None if self.composed is None else self.composed.run


def submit(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when there is a job."""
    own, other = split(arguments)
    options = _parser().parse_intermixed_args(own)
    now = datetime.datetime.now()
    plan = _other(options, other, now) if other else _training(options, now)
    cluster = _cluster(plan.job)
    if options.dry_run:
        print(_shown(plan, cluster), end="")
        return 0
    if _is_done(plan):
        return 0
    refuse(_problems(plan, cluster))
    if not options.quick and (code := _rehearse(plan, cluster)):
        return code
    _settle(plan)
    program = dataclasses.replace(plan.program, code=_keep_code(plan))
    _tell(plan, submit_once(plan.folder, plan.job, program, cluster))
    return 0


def _training(options: argparse.Namespace, now: datetime.datetime) -> Plan:
    composed = compose(options.overrides, options.config_dir)
    job = job_config(composed.job)
    for world in worlds(composed.run, job):
        composed.run.parallel.check_world(world)
    config = with_name(composed, now)
    folder = RunFolder.of(config.run_root, str(config.run))
    if not options.dry_run and folder.storage.exists(CONFIG):  # a dry run asks no store
        config = with_requests_of(thaw(folder.storage.read(CONFIG)), config)
    program = _program(str(config.run), folder, trainer(folder.storage.url, config.plugins, start_digest(config)))
    program = dataclasses.replace(program, config=freeze(config), plugins=tuple(config.plugins))
    return Plan(folder, job, program, dataclasses.replace(composed, run=config))


def _other(options: argparse.Namespace, words: Sequence[str], now: datetime.datetime) -> Plan:
    composed = compose_job(options.overrides, options.config_dir)
    refuse(program_problems(words, Path.cwd()))
    script = words[1] if words[0] == "-m" else words[0]
    refuse_secrets(words, "--")
    words = [_from_here(word) if word == script else word for word in words]
    name = composed.run or f"{Path(script).stem.replace('.', '-')}-{now:%Y%m%d-%H%M%S}"
    folder = RunFolder.of(composed.run_root, name)
    return Plan(folder, job_config(composed.job), _program(name, folder, words), access=composed.access)


def _from_here(script: str) -> str:
    """Return the script relative to the folder of the submission, of which the nodes have a copy."""
    inside = Path(script).is_absolute() and Path(script).is_relative_to(Path.cwd())
    return str(Path(script).relative_to(Path.cwd())) if inside else script


def _program(name: str, folder: RunFolder, argv: Sequence[str]) -> Program:
    return Program(name, folder.storage.url, tuple(argv), new_token(folder.storage.url))


def _cluster(job: JobConfig) -> Scheduler:
    if job.scheduler == "local":
        raise ConfigError(
            "job=local starts here and now: write everstep run, or torchrun for a script; or set job=slurm or job=k8s"
        )
    # On Kubernetes the secrets are in a Secret of the cluster, and this shell need not have them.
    if job.scheduler != "k8s" and (missing := [name for name in job.secrets if not os.environ.get(name)]):
        raise ConfigError(f"job.secrets names {', '.join(missing)}, which this shell does not have; export it first")
    return scheduler(job.scheduler, job)


def _is_done(plan: Plan) -> bool:
    last = plan.folder.last_ending()
    if plan.config is None or last is None or not last.is_done(plan.config.steps, plan.config.evaluate.patience):
        return False
    say(f"run {plan.config.run} is done: step {last.step} of {plan.config.steps} in {plan.folder.url}")
    return True


def _problems(plan: Plan, cluster: Scheduler) -> list[str]:
    if plan.composed is None:
        return cluster.problems(plan.job, plan.program)
    return check(plan.composed, plan.job, plan.program)


def _rehearse(plan: Plan, cluster: Scheduler) -> int:
    """Build the parts of the run; return the exit code. Skipped when a job exists, since it was checked."""
    if plan.config is None or current(plan.folder, cluster) is not None:
        return 0
    return rehearse(plan.config, plan.job, brief=True)


def _settle(plan: Plan) -> None:
    """Write into the run folder the config that the nodes will read."""
    if plan.config is None:
        if plan.folder.storage.exists(CONFIG):
            raise ConfigError(f"run {plan.program.name!r} is one of our trainer's; give another run=NAME")
        make_folder(plan.folder.storage, plan.access)
        return
    for change in settle(plan.config, plan.folder):
        say(f"changed since the last start: {change}")


def _keep_code(plan: Plan) -> str | None:
    """Snapshot the code into the run folder, so that later edits do not reach a queued job.

    Return None when there is no code.
    """
    from everstep.launch.submit.snapshot import take
    from everstep.provenance import record

    script = [plan.program.argv[0]] if plan.config is None else []
    plugins = plan.config.plugins if plan.config is not None else []
    code = take(plan.folder, Path.cwd(), plugins, script, plan.job.code_mb, plan.job.code_keep)
    if code.secrets:
        say(
            f"{', '.join(code.secrets)}: looks like a secret, and is left out of the code of the job; "
            "name it in job.code_keep to take it all the same"
        )
    for path in code.left_out:
        say(f"{path} is a link out of the checkout and does not go along")
    if plan.config is not None:
        record(plan.folder, plan.config, ["everstep", *sys.argv[1:]], code.digest)
    return code.place if code.files else None


def _tell(plan: Plan, receipt: Receipt) -> None:
    name, url = plan.program.name, plan.folder.storage.url
    if receipt.is_new:
        print(f"{name} in {url}: {receipt.handle}")
        return
    status = receipt.status
    state = "" if status is None else f" ({status.state.value}{f', {status.reason}' if status.reason else ''})"
    print(f"{name} in {url}: already submitted as {receipt.handle}{state}")


def _shown(plan: Plan, cluster: Scheduler) -> str:
    """Return the exact text of the submission; the token differs at each submission.

    Neither a cluster nor a remote store is queried; only local disks are read.
    """
    is_here = plan.folder.storage.path() is not None
    if plan.config is not None and is_here and plan.folder.storage.exists(CONFIG):
        changes_since(plan.config, plan.folder)
    token = "TOKEN"
    if plan.job.scheduler == "k8s":  # the manifest may be applied by hand, so its token must be unique to this run
        token = token_by_hand(plan.folder.storage.url)
    rendered = cluster.render(plan.job, dataclasses.replace(plan.program, token=token))
    if rendered.manifest:
        for mistake in rendered.mistakes:
            say(mistake)
        return rendered.manifest
    parts = {f"{plan.folder.storage.url}/job.yaml": job_yaml(plan.job), **rendered.files}
    if plan.program.config:
        parts = {f"{plan.folder.storage.url}/{CONFIG}": plan.program.config, **parts}
    shown = [f"# {name}\n{text.rstrip()}\n" for name, text in parts.items()]
    started = f"# every node starts\ntorchrun … {shlex.join(plan.program.argv)}\n"
    return "\n".join([*shown, started, f"# submitted by\n{shlex.join(rendered.argv)}\n"])


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep submit",
        usage="everstep submit [--dry-run] [--quick] [--config-dir DIR] key=value … [-- SCRIPT …]",
        description="Queue a run on a cluster; the shell may be closed afterwards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted; write nothing")
    parser.add_argument("--quick", action="store_true", help="do not build the model before; what needs no torch only")
    return parser
