"""Checks of this machine for `everstep doctor`: what starts, links and saves of a run depend on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from everstep.config.data_loading import LoaderConfig
from everstep.control_group import memory_usage
from everstep.errors import EverstepError, StorageError
from everstep.import_path import safe_flags
from everstep.launch import torchrun
from everstep.launch.config import JobConfig
from everstep.launch.config.devices import gpus
from everstep.launch.finding import Finding
from everstep.launch.node.checks import BadNode, address, open_files
from everstep.storage import open_storage, probe

PACKAGES = ("everstep", "torch", "numpy", "pyarrow", "hydra-core", "fsspec")
LEFT_OVER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""Variables of torchrun that a shell must not hand down to new starts."""
LEAST_SHARED_BYTES = 1 << 30
LEAST_DISK_BYTES = 10 << 30
PROBE_BYTES = 16 << 20
MOST_SKEW_S = 2.0
LINK_S = 120.0
WANDB_S = 3.0


def findings(job: JobConfig, run_root: str) -> Iterator[Finding]:
    """Yield the findings of all checks, in the order in which a run would meet the problems."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        capacity,
        limits,
        lambda: names(job.interface),
        lambda: run_folder(run_root),
        caches,
        wandb,
        lambda: link(job),
    ]
    for check in checks:
        yield from check()


def versions() -> Iterator[Finding]:
    found = {name: _version(name) for name in PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield Finding("versions", f"Python {platform.python_version()}, {shown}")
    if found["torch"] is None:
        yield Finding("versions", "torch is not installed; install it from https://pytorch.org for your devices", False)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def capacity() -> Iterator[Finding]:
    """Yield cores and memory of this process's group, and GPUs as the driver lists them."""
    memory, group = psutil.virtual_memory(), memory_usage()
    free = min(memory.available, group.free) if group is not None else memory.available
    cores = len(os.sched_getaffinity(0))
    yield Finding("capacity", f"{cores} cores, {_gb(free)} of memory free, {gpus()} GPUs")


def limits() -> Iterator[Finding]:
    """Yield limits of open files and of /dev/shm, of which loaders and copies on the node need some."""
    try:
        open_files()
        yield Finding("open files", f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]} at most")
    except BadNode as bad:
        yield Finding("open files", str(bad), False)
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        yield Finding("/dev/shm", f"{error}; copies of checkpoints on the node are left out", None)
        return
    roomy = free >= LEAST_SHARED_BYTES
    advice = "" if roomy else "; give the container more (docker run --shm-size=16g, an emptyDir of medium Memory)"
    yield Finding("/dev/shm", f"{_gb(free)} free{advice}", True if roomy else None)


def names(interface: str | None) -> Iterator[Finding]:
    """Yield the address that other nodes are given, and variables of another start in this shell."""
    try:
        yield Finding("address", f"{socket.gethostname()} is {address(interface)} for other nodes")
    except BadNode as bad:
        # One machine alone does without; a named interface that is not there is a mistake.
        yield Finding("address", f"{bad} (for runs on several nodes)", None if interface is None else False)
    if left := [name for name in LEFT_OVER if name in os.environ]:
        yield Finding("environment", f"{', '.join(left)} set in this shell, as if a rank ran in it; unset them", None)


def run_folder(url: str) -> Iterator[Finding]:
    """Yield reach, rates, create-only writes, clock and room of the folder of runs."""
    storage = open_storage(url)
    local = storage.path()
    made = local is not None and not local.exists()
    name, data = f".doctor-{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    try:
        began = time.monotonic()
        storage.write(name, data)
        written = time.monotonic()
        if storage.read(name) != data:
            raise StorageError("it gives back other bytes than were written")
        read = time.monotonic()
        if storage.create(name, b"second"):
            raise StorageError("a second writer may overwrite what a first one has created")
        probe(storage)
        if local is not None:
            yield from _clock(local / name)
        storage.delete(name)
    except (OSError, EverstepError) as error:
        yield Finding("run_root", f"{url}: {error}; choose another run_root", False)
        return
    rates = f"{_rate(written - began)} written, {_rate(read - written)} read, create-only"
    room = "" if local is None else f", {_gb(shutil.disk_usage(local).free)} free"
    yield Finding("run_root", f"{url}: {rates}{room}")
    if made and local is not None:
        local.rmdir()


def _clock(written: Path) -> Iterator[Finding]:
    skew = written.stat().st_mtime - time.time()
    if abs(skew) > MOST_SKEW_S:
        text = f"the file server's clock is {skew:+.0f} s from this machine's; set both by NTP"
        yield Finding("clock", text, None)


def caches() -> Iterator[Finding]:
    """Yield the room for downloaded shards."""
    folder = Path(LoaderConfig().cache_folder())
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("cache", f"{folder} cannot be written; set EVERSTEP_CACHE or loader.cache", None)
        return
    free = shutil.disk_usage(there).free
    advice = "" if free >= LEAST_DISK_BYTES else "; set EVERSTEP_CACHE or loader.cache to a larger disk"
    yield Finding("cache", f"{folder}: {_gb(free)} free{advice}", True if not advice else None)


def wandb() -> Iterator[Finding]:
    """Yield the reach of W&B, if it is installed and not offline."""
    if importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), timeout=WANDB_S):
            yield Finding("W&B", f"{host.hostname} can be reached")
    except OSError as error:
        text = f"{host.hostname} cannot be reached ({error}); with W&B use log.wandb.mode=offline and 'everstep sync'"
        yield Finding("W&B", text, None)


def link(job: JobConfig) -> Iterator[Finding]:
    """Yield torch's devices and the rate of an all-reduce between two processes."""
    if _version("torch") is None:
        return
    program = ["-m", "everstep.trainer.preflight.link_check"]
    argv = torchrun.agent(program, 2, job.grace_s, torchrun.Rendezvous(id=uuid.uuid4().hex))
    argv[1:1] = safe_flags()
    inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OVER}
    env = torchrun.environment(inherited, 1, job.env)
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LINK_S, check=False)
    except subprocess.TimeoutExpired:
        text = f"an all-reduce of two processes did not end in {LINK_S:.0f} s; set job.interface"
        yield Finding("all-reduce", text, False)
        return
    facts = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if done.returncode or facts is None:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        yield Finding("all-reduce", f"two processes cannot form a group: {said}", False)
        return
    yield from _linked(json.loads(facts))


def _linked(facts: dict[str, object]) -> Iterator[Finding]:
    devices, seen = int(str(facts["devices"])), gpus()
    if seen and not devices:
        text = f"the driver lists {seen} GPUs and torch {facts['torch']} sees none; install a torch built for CUDA"
        yield Finding("devices", text, False)
    elif devices:
        yield Finding("devices", f"{devices} × {facts['name']}")
    yield Finding("all-reduce", f"{facts['gb_per_s']} GB/s between two processes over {facts['backend']}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _rate(seconds: float) -> str:
    return f"{PROBE_BYTES / 1e6 / max(seconds, 1e-6):.0f} MB/s"
