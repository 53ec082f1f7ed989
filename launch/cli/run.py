"""`everstep run`: compose, settle the config in the run folder, and run the trainer to the end."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import socket
import sys
import uuid
from collections.abc import Sequence

from everstep.compose import compose, with_name
from everstep.config import ParallelKind, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, settle, start_digest, thaw, with_steps_of
from everstep.import_path import safe_environment
from everstep.launch import torchrun
from everstep.launch.config import JobConfig, job_config, job_yaml, processes, refuse_too_many, threads
from everstep.launch.console import say
from everstep.launch.job_start.local_start import Local
from everstep.launch.job_start.rank_starter import RankStarter
from everstep.launch.job_start.signals import Signals
from everstep.launch.parser import Arguments, add_overrides, split
from everstep.launch.restart.supervisor import Supervisor, marker
from everstep.launch.runs.lookup import ROOT
from everstep.launch.runs.notifier import Notifier
from everstep.launch.submit.trust import Runnable, sign
from everstep.rank_env import WORLD
from everstep.run_folder import CONFIG, GRACE, JOB, STARTER, RunFolder
from everstep.security.job_secrets import START_KEY, TOKEN

PDB = ("debug=pdb",)
"""Words that --pdb stands for."""
EXAMPLES = """examples:
  everstep run experiment=gpt_stdlib                          on all GPUs of this machine, or on its CPU
  everstep run experiment=gpt_stdlib parallel=fsdp job.nproc=2 run=demo
  everstep run experiment=gpt_stdlib run=demo steps=2000      the same run goes on from its last checkpoint
  everstep run experiment=digits run_root=s3://bucket/runs    the run folder in an object store
  everstep run --config-dir conf experiment=mine plugins=[my_package]
  everstep run experiment=digits --from my_sweep/best         with the values of a sweep's winner, as a new run
  everstep run --pdb experiment=mine                          pdb where an error is raised; debug=overfit and others
  everstep run job.nproc=2 -- train_my_way.py --any --flags   a script for torchrun, started again after a crash
  everstep run --cfg experiment=digits                        show the resolved config and start nothing

Ctrl-C once saves and stops; twice leaves at once.
exit codes: 0 done, 2 the config cannot run, 3 diverged, 4 taken over by another start, 75 stopped and saved, 1 crashed
"""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is that of the run's outcome."""
    arguments, script = split(arguments)
    options = _parser().parse_intermixed_args(arguments)
    if script:
        from everstep.launch.cli.run_script import run_script  # imported for a script only

        return run_script(options.overrides, options.config_dir, script)
    words = [*(_winner(options.winner) if options.winner else []), *(PDB if options.pdb else []), *options.overrides]
    composed = compose(words, options.config_dir)
    job = job_config(composed.job)
    _check_here(job)
    if options.cfg:
        print(freeze(composed.run) + "job:\n" + "".join(f"  {line}\n" for line in job_yaml(job).splitlines()), end="")
        return 0
    nproc = _processes(composed.run, job)
    refuse_too_many(nproc)
    _check_debugger(composed.run, job, nproc)
    if nproc > 1:
        _check_loopback()
    composed.run.parallel.check_world(nproc)
    config = with_name(composed, datetime.datetime.now())
    folder = RunFolder.of(config.run_root, str(config.run))
    for change in settle(config, folder):
        say(f"changed since the last start: {change}")
    config = with_steps_of(thaw(folder.storage.read(CONFIG)), config)
    last = folder.last_ending()
    if last is not None and last.is_done(config.steps, config.evaluate.patience):
        say(f"run {config.run} is done: step {last.step} of {config.steps} in {folder.url}")
        return 0
    return start(config, job, nproc, folder)


def start(config: RunConfig, job: JobConfig, nproc: int, folder: RunFolder) -> int:
    """Record the job, the provenance and the environment of the start, and run the trainer."""
    from everstep.provenance import record

    share = threads(job, nproc)
    job = dataclasses.replace(job, nproc=nproc, threads=share)
    url, plugins, digest = folder.storage.url, config.plugins, start_digest(config)
    argv = torchrun.command(url, nproc, job.grace_s, plugins, digest)
    starter = uuid.uuid4().hex
    extra = {**safe_environment(), GRACE: str(job.grace_s), **job.env, STARTER: starter, WORLD: str(nproc)}
    # A token is for the jobs that this shell submits; the ranks here get the key of their start.
    base = {name: value for name, value in os.environ.items() if name not in (TOKEN, START_KEY)}
    env = torchrun.environment(base, share, extra)
    say(f"run {config.run} in {folder.url}: {nproc} {'process' if nproc == 1 else 'processes'}")
    with Signals() as signals:
        local = Local(signals, marker(folder), job.grace_s, agent=nproc > 1)
        reads = nproc == 1 or config.debug.rank is not None
        with RankStarter(local, torchrun.trainer(url, plugins, digest), env, nproc, job.warm, reads=reads) as ranks:
            ranks.prepare()  # it imports torch while the records are written
            sign(folder.storage, Runnable.of(job, config.plugins).of_folder(folder.storage))
            folder.storage.write(JOB, job_yaml(job).encode())
            record(folder, config, ["everstep", *sys.argv[1:]])
            with Notifier(folder, str(config.run), job.notify):
                return Supervisor(folder, local, job.max_restarts, starter).run(lambda: ranks.run(argv))


def _winner(word: str) -> list[str]:
    from everstep.launch.sweep import status  # imported for a sweep only, to keep start-up fast

    return status.winner(word, ROOT)


def _check_debugger(config: RunConfig, job: JobConfig, nproc: int) -> None:
    """Raise ConfigError if pdb would have no terminal."""
    rank = config.debug.rank
    if config.debug.post_mortem and nproc > 1 and rank is None:
        raise ConfigError(
            f"debug.post_mortem=true on {nproc} processes: which of them gets pdb? debug.rank=N, or job.nproc=1"
        )
    if rank is not None and nproc > 1 and not job.warm:
        raise ConfigError("job.warm=false: torchrun gives no rank the terminal; leave it out together with debug.rank")


def _check_here(job: JobConfig) -> None:
    if job.scheduler != "local":
        raise ConfigError(f"job={job.scheduler} is a cluster: write everstep submit, or job=local to start here")
    if job.node_range != (1, 1):
        raise ConfigError(f"job.nodes={job.nodes}: job=local is this one machine; choose job=slurm or job=k8s")


def _check_loopback() -> None:
    """Raise ConfigError if local processes cannot connect: in a network namespace without `lo`."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"127.0.0.1 cannot be reached ({error.strerror or error}), and several processes meet there; "
            "use job.nproc=1, or ip link set lo up"
        ) from error


def _processes(config: RunConfig, job: JobConfig) -> int:
    single = job.nproc == "auto" and config.parallel.kind is ParallelKind.single
    return 1 if single else processes(job)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep run",
        description="Train here and now; go on from the last checkpoint when the run exists.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_overrides(parser)
    parser.add_argument("--from", dest="winner", metavar="SWEEP/best", help="with the values of a sweep's best trial")
    parser.add_argument("--pdb", action="store_true", help="open pdb where an error is raised (debug=pdb)")
    parser.add_argument("--cfg", action="store_true", help="print the resolved config and start nothing")
    return parser
