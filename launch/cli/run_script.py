"""`everstep run … -- SCRIPT`: any script for torchrun on this machine, with restarts."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

from everstep.compose import compose_job
from everstep.errors import ConfigError
from everstep.launch import torchrun
from everstep.launch.config import JobConfig, job_config, job_yaml, processes, refuse_too_many, threads
from everstep.launch.console import say
from everstep.launch.job_start.local_start import LeftAtOnce, Local
from everstep.launch.job_start.output_capture import Output
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import NodeReport
from everstep.launch.node.agent import SCRIPT_IDLE_S
from everstep.launch.preflight.checks import program_problems, refuse
from everstep.launch.restart.job_policy import Action, Evidence, RestartDecision, judge
from everstep.launch.restart.local_policy import back_off_s
from everstep.launch.submit.trust import Runnable, sign
from everstep.outcome import Outcome
from everstep.run_folder import GRACE, JOB, STARTER, RunFolder
from everstep.security.access import make_folder
from everstep.security.job_secrets import START_KEY, TOKEN
from everstep.security.secret_detection import refuse_secrets


def run_script(overrides: Sequence[str], config_dirs: Sequence[str], words: Sequence[str]) -> int:
    """Run a script here until it has ended well, or another start would not help."""
    composed = compose_job(overrides, config_dirs)
    job = job_config(composed.job)
    if job.scheduler != "local":
        raise ConfigError(f"job={job.scheduler} is a cluster: write everstep submit … -- {words[0]}")
    refuse(program_problems(words, Path.cwd()))
    refuse_secrets(list(words), "--")
    script = words[1] if words[0] == "-m" else words[0]
    name = composed.run or f"{Path(script).stem.replace('.', '-')}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    nproc = processes(job)
    refuse_too_many(nproc)
    job = dataclasses.replace(job, nproc=nproc, threads=threads(job, nproc))
    folder = RunFolder.of(composed.run_root, name)
    make_folder(folder.storage, composed.access)
    sign(folder.storage, Runnable.of(job, argv=words))
    folder.storage.write(JOB, job_yaml(job).encode())
    say(
        f"{script} as {name}: {nproc} {'process' if nproc == 1 else 'processes'}; restarts are recorded in {folder.url}"
    )
    return _until_done(folder, job, nproc, words)


def _until_done(folder: RunFolder, job: JobConfig, nproc: int, words: Sequence[str]) -> int:
    base = {name: value for name, value in os.environ.items() if name not in (TOKEN, START_KEY)}
    extra = {GRACE: str(job.grace_s), **job.env, STARTER: uuid.uuid4().hex}
    env = torchrun.environment(base, job.threads or 1, extra)
    spent = 0
    with Signals() as signals:
        local = Local(signals, lambda reason: None, job.grace_s, agent=True)
        local.idle_s = SCRIPT_IDLE_S
        while True:
            argv = torchrun.agent(words, nproc, job.grace_s, torchrun.Rendezvous(id=uuid.uuid4().hex))
            decision = _decide(local, job, argv, env, spent)
            if decision is None:
                say("left at once")
                return 130
            again = decision.action is not Action.exit and local.stopped is None
            say(decision.reason if again or local.stopped is None else f"stopped by {local.stopped}")
            facts = {
                "outcome": decision.cause,
                "go_on": again,
                "reason": decision.reason,
                "restarts": decision.restarts,
            }
            folder.record_restart(facts)
            if not again or not local.wait(back_off_s(decision.restarts)):
                return decision.exit_code if local.stopped is None else Outcome.preempted.exit_code
            spent = decision.restarts


def _decide(
    local: Local, job: JobConfig, argv: Sequence[str], env: dict[str, str], spent: int
) -> RestartDecision | None:
    """Run one start; return the decision after it by the policy of jobs, None if the user left at once."""
    output, host = Output(job.all_causes()), socket.gethostname()
    try:
        with output:
            code = local.run(argv, env, output.descriptor)
    except LeftAtOnce:
        return None
    cause, line = output.cause() if code else (None, "")
    report = NodeReport(host, (), code, local.stopped, cause, line)
    evidence = Evidence(code=code, hosts=(host,), reports=(report,), is_trainer=False, spent=spent)
    return judge(evidence, job.all_causes(), job.max_restarts)
