"""Preflight checks of a run and its job without torch; one line each, with the key to change."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from everstep.compose import Composed
from everstep.dataset.index import ShardIndex, folders
from everstep.dataset.tags import policy_fault
from everstep.errors import ConfigError, EverstepError
from everstep.frozen_config import changes_since, freeze
from everstep.launch.config import JobConfig
from everstep.launch.console import say
from everstep.launch.preflight.dataset_paths import datasets, only_there
from everstep.launch.preflight.model import worlds
from everstep.launch.schedulers.base import Program
from everstep.launch.schedulers.registry import scheduler
from everstep.registry.address import is_address, version_at
from everstep.run_folder import CONFIG, RunFolder
from everstep.storage import open_storage


def check(composed: Composed, job: JobConfig, program: Program | None = None) -> list[str]:
    """Return all problems of the run and its job that can be found without torch.

    Args:
        program: the program to submit, where it is known already.
    """
    looks: list[Callable[[], Iterator[str]]] = [
        lambda: _world(composed, job),
        lambda: _devices(job),
        lambda: _secrets(job),
        lambda: _plugins(composed),
        lambda: _run_root(composed),
        lambda: _folder(composed),
        lambda: _data(composed, job),
        lambda: _init_from(composed, job),
        lambda: _cluster(job, program or _program(composed)),
    ]
    found: list[str] = []
    for look in looks:
        try:
            found += look()
        except EverstepError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def refuse(problems: Sequence[str]) -> None:
    """Raise ConfigError if there are any problems; all of them are printed."""
    for problem in problems[:-1]:
        say(problem)
    if problems:
        raise ConfigError(problems[-1])


def program_problems(argv: Sequence[str], where: Path) -> list[str]:
    """Return the problems of a program for torchrun: a script with its flags, or -m and a module."""
    if list(argv[:1]) == ["-m"]:
        module = argv[1] if len(argv) > 1 else ""
        return [] if _is_importable(module.split(".")[0], where) else [f"-m {module}: there is no such module"]
    if not argv:
        return ["there is nothing to run after '--'; name a script"]
    return [] if (where / argv[0]).is_file() else [f"{argv[0]}: there is no such script in {where}; change it"]


def _world(composed: Composed, job: JobConfig) -> Iterator[str]:
    for world in worlds(composed.run, job):
        composed.run.parallel.check_world(world)
    yield from ()


def _devices(job: JobConfig) -> Iterator[str]:
    """Check that each process of the trainer has its own GPU, if the job has any."""
    if isinstance(job.gpus, int) and isinstance(job.nproc, int) and 0 < job.gpus < job.nproc:
        yield f"job.nproc={job.nproc}: each process needs a GPU, and job.gpus={job.gpus}; change job.nproc or job.gpus"


def _secrets(job: JobConfig) -> Iterator[str]:
    if job.scheduler == "k8s":  # the secrets are in a Secret of the cluster
        return
    for name in job.secrets:
        if not os.environ.get(name):
            yield f"job.secrets: {name} is not set here; export it, or take it out of job.secrets"


def _plugins(composed: Composed) -> Iterator[str]:
    for package in composed.run.plugins:
        if not _is_importable(package.split(".")[0], Path.cwd()):
            yield f"plugins: there is no package {package!r} in {Path.cwd()} or installed; change plugins"


def _is_importable(package: str, where: Path) -> bool:
    """True if Python would find the package. It is not imported."""
    return PathFinder.find_spec(package, [str(where), *sys.path]) is not None


def _run_root(composed: Composed) -> Iterator[str]:
    """Write, read and delete a file in the folder of runs."""
    root = composed.run.run_root
    storage = open_storage(root)
    local = storage.path()
    made = [folder for folder in (local, *local.parents) if not folder.exists()] if local is not None else []
    name, data = f".check-{uuid.uuid4().hex}", os.urandom(64)
    try:
        storage.write(name, data)
        if storage.read(name) != data:
            yield f"run_root={root!r}: what was written reads back as something else; change run_root"
        storage.delete(name)
    except (EverstepError, OSError) as error:
        yield f"run_root={root!r}: {error}; change run_root"
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _folder(composed: Composed) -> Iterator[str]:
    """Check that the config of an existing run has changed only where it may."""
    if composed.run.run is not None:
        folder = RunFolder.of(composed.run.run_root, composed.run.run)
        if folder.storage.exists(CONFIG):
            changes_since(composed.run, folder)
    yield from ()


def _data(composed: Composed, job: JobConfig) -> Iterator[str]:
    """Check that each prepared dataset exists."""
    for key, path in datasets(composed.run):
        if not only_there(path, job) and not open_storage(path).names():
            yield f"{key}={path!r}: there is no dataset; change {key}, or make it with 'everstep data prepare'"
        elif composed.run.policy.allow_tags is not None and not only_there(path, job):
            for folder in folders(path):
                if fault := policy_fault(composed.run.policy.allow_tags, folder, ShardIndex.read(folder).tags):
                    yield fault


def _init_from(composed: Composed, job: JobConfig) -> Iterator[str]:
    url = composed.run.init_from
    if url is not None and is_address(url):
        version_at(url)
        return
    if url is None or only_there(url, job):
        return
    # RUN/best is an alias, not a folder.
    if not open_storage(url).names() and not open_storage(url.rstrip("/").removesuffix("/best")).names():
        yield f"init_from={url!r}: there is neither a checkpoint nor a run; change init_from"


def _cluster(job: JobConfig, program: Program) -> Iterator[str]:
    if job.scheduler != "local":
        yield from scheduler(job.scheduler, job).problems(job, program)


def _program(composed: Composed) -> Program:
    """Return the program of a submission, with a placeholder for a missing run name."""
    name = composed.run.run or "everstep-check"
    folder = RunFolder.of(composed.run.run_root, name)
    return Program(name, folder.storage.url, (), "check", freeze(composed.run))
