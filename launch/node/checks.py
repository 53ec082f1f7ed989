"""Checks of a node before training. Torch is loaded only in a child process that checks the GPUs."""

from __future__ import annotations

import ipaddress
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

from everstep.errors import EverstepError
from everstep.launch.config import JobConfig, processes
from everstep.launch.config.devices import gpus
from everstep.run_folder import STARTS, RunFolder

LEAST_FILES = 4096


class BadNode(Exception):
    """A check has failed; the message is the problem and, where it helps, the key to change."""


def failures(job: JobConfig, folder: RunFolder, host: str, nodes: int) -> list[str]:
    """Return one line per failed check; all checks together take at most job.check_s seconds."""
    checks: list[Callable[[], object]] = [lambda: storage(folder, host), lambda: devices(job), open_files]
    if nodes > 1 or job.interface is not None:
        checks.insert(0, lambda: address(job.interface))
    waiting = [(_in_background(check)) for check in checks]
    return [line for future in waiting if (line := _failure(future, job.check_s)) is not None]


def address(interface: str | None) -> str:
    """Return the IPv4 address of this node: the interface's, or what the node's own name resolves to."""
    if interface is not None:
        return _address_of(interface)
    name = socket.gethostname()
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError as error:
        raise BadNode(f"its own name {name} does not resolve ({error}); set job.interface") from error
    outward = [text for text in found if not ipaddress.ip_address(text).is_loopback]
    if not outward:
        # gloo publishes this address to the other nodes, which would then connect to themselves.
        raise BadNode(
            f"/etc/hosts gives its own name {name} the address {found[0]}; set job.interface, or mend the file"
        )
    return outward[0]


def _address_of(interface: str) -> str:
    import psutil

    known = psutil.net_if_addrs()
    for address in known.get(interface, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    there = ", ".join(name for name in known if name != "lo") or "none"
    raise BadNode(f"no interface {interface} with an IPv4 address (there are {there}); change job.interface")


def storage(folder: RunFolder, host: str) -> None:
    """Write, read and remove a file in the run folder."""
    name, text = f"{STARTS}/probe-{host}", host.encode()
    try:
        folder.storage.write(name, text)
        if folder.storage.read(name) != text:
            raise BadNode(f"the run folder {folder.url} gives back other bytes than were written")
        folder.storage.delete(name)
    except (OSError, EverstepError) as error:
        raise BadNode(f"the run folder {folder.url} cannot be used: {error}") from error


def open_files() -> None:
    """Check the limit of open files, of which loaders and connections need some thousand."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise BadNode(
            f"a process may open {hard} files; raise it to {LEAST_FILES} (ulimit -Hn, LimitNOFILE= of the service)"
        )


def devices(job: JobConfig) -> None:
    """Check that the requested GPUs are present, compute a matrix product, and take part in an all-reduce."""
    asked = _asked(job)
    if not asked:
        return
    seen = gpus()
    if seen < asked:
        raise BadNode(f"{asked} GPUs were asked for, and {seen} can be seen")
    argv = [sys.executable, "-m", "everstep.trainer.preflight.gpu_check", str(asked)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=job.check_s, check=False)
    if done.returncode:
        raise BadNode(f"GPU check: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")


def _asked(job: JobConfig) -> int:
    if isinstance(job.gpus, int):
        return min(job.gpus, processes(job))
    # With gpus=auto, nodes without GPUs are not refused: the same job may be tried on CPUs.
    return min(gpus(), processes(job))


def _in_background(check: Callable[[], object]) -> Future[None]:
    """Run the check in a daemon thread, which exit does not wait for: a file server may hang without end."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            check()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _failure(future: Future[None], seconds: float) -> str | None:
    try:
        future.result(seconds)
    except BadNode as bad:
        return str(bad)
    except (TimeoutError, subprocess.TimeoutExpired):
        return f"a check did not end within job.check_s={seconds:.0f} s (a file server that hangs, or a device)"
    return None
