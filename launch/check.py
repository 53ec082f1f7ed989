"""`everstep check`: all that can be known before the queue, each failure one line with the key to change."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from launch.cluster import scheduler
from launch.config import JobConfig, job_config, processes
from launch.mistakes import composed_or_mistakes
from trainer.compose import Composed, refuse_changes, thaw
from trainer.config import ParallelKind
from trainer.errors import ConfigError, EverstepError
from trainer.run_folder import CONFIG, RunFolder
from trainer.storage import open_storage

EXAMPLES = """examples:
  everstep check experiment=gpt_stdlib parallel=fsdp job.nproc=8
  everstep check job=slurm job.nodes=16 job.time=24h experiment=mine --config-dir conf
  everstep check --quick job=slurm experiment=mine       what needs no torch, in under a second

exit codes: 0 nothing stands against the run, 2 something does
"""


def run(arguments: Sequence[str]) -> int:
    """The verb: first what needs no torch, then the trainer's part in a process of its own."""
    options = _parser().parse_intermixed_args(arguments)
    composed, found = composed_or_mistakes(options.overrides, options.config_dir)
    world = 1
    if composed is not None:
        job = job_config(composed.job)
        found, world = check(composed, job), world_of(composed, job)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    code = ConfigError.exit_code if found else 0
    if options.quick or composed is None:
        return code
    words = [*options.overrides, *(word for name in options.config_dir for word in ("--config-dir", name))]
    trainer = [sys.executable, "-m", "trainer", "check", "--world", str(world), *words]
    return max(code, subprocess.run(trainer, check=False).returncode)


def check(composed: Composed, job: JobConfig) -> list[str]:
    """What stands against the run and its job, as far as it can be known without torch; empty when nothing does."""
    looks: list[Callable[[], Iterator[str]]] = [
        lambda: _world(composed, job),
        lambda: _secrets(job),
        lambda: _plugins(composed),
        lambda: _run_root(composed),
        lambda: _folder(composed),
        lambda: _data(composed),
        lambda: _init_from(composed),
        lambda: _cluster(job),
    ]
    found: list[str] = []
    for look in looks:
        try:
            found += look()
        except EverstepError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def world_of(composed: Composed, job: JobConfig) -> int:
    """Processes in all, or the fewest that could be."""
    nodes = int(job.node_range[1])
    if isinstance(job.nproc, int):
        return nodes * job.nproc
    if job.scheduler == "local":
        return 1 if composed.run.parallel.kind is ParallelKind.single else processes(job)
    gpus = job.gpus  # of the nodes: this machine may have none
    return nodes * (gpus if isinstance(gpus, int) and gpus else 1)


def program_problems(argv: Sequence[str], where: Path) -> list[str]:
    """What stands against a program that torchrun is to start: a script with its flags, or -m and a module."""
    if list(argv[:1]) == ["-m"]:
        module = argv[1] if len(argv) > 1 else ""
        return [] if _is_importable(module.split(".")[0], where) else [f"-m {module}: there is no such module"]
    if not argv:
        return ["there is nothing to run after '--'; name a script"]
    return [] if (where / argv[0]).is_file() else [f"{argv[0]}: there is no such script in {where}; change it"]


def _world(composed: Composed, job: JobConfig) -> Iterator[str]:
    composed.run.parallel.check_world(world_of(composed, job))
    yield from ()


def _secrets(job: JobConfig) -> Iterator[str]:
    if job.scheduler == "k8s":  # they are in a Secret of the cluster
        return
    for name in job.secrets:
        if not os.environ.get(name):
            yield f"job.secrets: {name} is not set here; export it, or take it out of job.secrets"


def _plugins(composed: Composed) -> Iterator[str]:
    for package in composed.run.plugins:
        if not _is_importable(package.split(".")[0], Path.cwd()):
            yield f"plugins: there is no package {package!r} in {Path.cwd()} or installed; change plugins"


def _is_importable(package: str, where: Path) -> bool:
    """Whether Python would find it; it is not imported."""
    return PathFinder.find_spec(package, [str(where), *sys.path]) is not None


def _run_root(composed: Composed) -> Iterator[str]:
    """Write, read and delete a file where the runs will be."""
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
    """A run that exists goes on: what changed must be of what may."""
    if composed.run.run is not None:
        folder = RunFolder.of(composed.run.run_root, composed.run.run)
        if folder.storage.exists(CONFIG):
            refuse_changes(thaw(folder.storage.read(CONFIG).decode()), composed.run)
    yield from ()


def _data(composed: Composed) -> Iterator[str]:
    """Prepared datasets are folders with names in them; what other datasets need only they know."""
    node = composed.run.data or {}
    if str(node.get("_target_", "")).startswith("trainer.data.prepared."):
        mixed = [(f"data.mix[{n}].path", each.get("path")) for n, each in enumerate(node.get("mix") or [])]
        for key, path in [("data.path", node.get("path")), *mixed]:
            if path is not None and not open_storage(str(path)).names():
                yield f"{key}={path!r}: there is no dataset; change {key}, or make it with 'everstep data prepare'"


def _init_from(composed: Composed) -> Iterator[str]:
    url = composed.run.init_from
    if url is not None and not open_storage(url).names():
        yield f"init_from={url!r}: there is neither a checkpoint nor a run; change init_from"


def _cluster(job: JobConfig) -> Iterator[str]:
    if job.scheduler != "local":
        yield from scheduler(job.scheduler, job).problems(job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="everstep check",
        description="All that can be known before a run starts: every problem is listed, nothing is started.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/run.yaml")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")
    parser.add_argument("--quick", action="store_true", help="only what needs no torch")
    return parser
