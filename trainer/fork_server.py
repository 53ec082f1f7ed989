"""Fork server of a node: a process with the imports of a rank, from which all ranks are forked.

Started by the launcher as `python -m everstep.trainer --fork-server FD …`, with the arguments of the ranks. FD is a
socket: the launcher asks on it for ranks (`everstep/fork_requests.py`), and the server says that it is ready, which
processes it has forked, and how each has ended. Between two starts it waits, so a restart imports nothing.

The process has one thread and has not initialized CUDA: neither survives a fork. It ignores the signals that ask a run
to stop, and ends with the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.fork_requests import Message, receive, send
from everstep.process_setup import use_own_cache, without_collections
from everstep.rank_env import AGENT_PID, die_with_parent
from everstep.trainer.stop import SIGNALS

IGNORED = (*SIGNALS, signal.SIGHUP)
OPTION = "--fork-server"


def serve(arguments: Sequence[str]) -> list[str]:
    """Fork a process for each request; return in the forked process, with the arguments of a rank."""
    control = _control(arguments)
    die_with_parent()
    inherited = {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
    try:
        use_own_cache()  # before torch makes its own
    except ConfigError as refused:
        send(control, {"ready": str(refused)})
        raise SystemExit(refused.exit_code) from None
    _import_ranks_modules()
    os.environ[AGENT_PID] = str(os.getpid())  # of the ranks: whether it has died meanwhile they see by its number
    send(control, {"ready": unfit()})
    request, output = _until_forked(control)
    for number, handler in inherited.items():
        signal.signal(number, handler)
    _become_rank(request, output)
    return list(arguments[1:])


def _control(arguments: Sequence[str]) -> socket.socket:
    try:
        control = socket.socket(fileno=int(arguments[0]))
        control.set_inheritable(False)  # a program that an import or a rank starts could ask for ranks on it
        return control
    except (IndexError, ValueError, OSError):
        print(f"error: {OPTION} FD: the launcher gives it a socket; start a run with everstep run", file=sys.stderr)
        raise SystemExit(2) from None


def _import_ranks_modules() -> None:
    """Import all that a rank of any run needs, and keep these objects out of garbage collections."""
    with without_collections():
        import everstep.trainer.assemble
        import everstep.trainer.distributed.mesh
        import everstep.trainer.worker  # noqa: F401
        from everstep import config, frozen_config

        frozen_config.thaw(frozen_config.freeze(config.RunConfig()))  # fills the tables of the parser
        gc.freeze()


def unfit() -> str:
    """Return why this process must not be forked; empty if it may."""
    import torch

    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)  # OpenBLAS ends its threads before a fork, and starts them when they are needed again
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"{threads} threads run after the imports, which a fork would not copy"
    return "CUDA is initialized after the imports, which does not survive a fork" if torch.cuda.is_initialized() else ""  # type: ignore[no-untyped-call]


def _until_forked(control: socket.socket) -> tuple[Message, int | None]:
    """Serve requests and report ended processes; return in each forked process its request and its output."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([control.fileno(), reading], [], [])
        if reading in ready:
            os.read(reading, 4096)
            _report_ended(control)
        if control.fileno() in ready:
            request, output = receive(control)
            if request is None:
                os._exit(0)  # the launcher has ended; its death ends the ranks
            if (pid := _fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (reading, writing):
                    os.close(descriptor)
                control.close()
                return request, output
            if output is not None:
                os.close(output)
            request = output = None  # with the key of the start, which later ranks need not inherit
            _report_forked(control, pid)


def _fork() -> int:
    """Fork; in the child the signals stay blocked until the trainer listens to them, so that none is lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid != 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return pid


def _report_forked(control: socket.socket, pid: int) -> None:
    """Send the PID with a pidfd: once a process is reaped, its number may pass to another one."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # a sandbox or kernel without them
        send(control, {"forked": pid})
        return
    send(control, {"forked": pid}, descriptor)
    os.close(descriptor)


def _report_ended(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            send(control, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def _become_rank(request: Message, output: int | None) -> None:
    """Take the environment and the output of a rank, and seeds that no other process has."""
    import numpy as np

    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    np.random.seed()  # Python's own `random` seeds itself after a fork
