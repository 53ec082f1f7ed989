"""The process behind the fixture `warm`: it imports what torchrun, the launcher and the trainer do, and is forked."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import inspect
import io
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, NoReturn

from support.kube.forked_container import enter, split

Plain = dict[str, Any]
EXEC = subprocess.Popen._execute_child  # type: ignore[attr-defined]
SIGNATURE = inspect.signature(EXEC)
PLAIN = {"shell": False, "executable": None, "close_fds": True, "pass_fds": (), "restore_signals": True, "gid": None,
         "gids": None, "uid": None, "umask": -1}  # fmt: skip
"""A command with other options than these is not forked."""
INSTALLED_PATH = [path for path in sys.path[1:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
"""sys.path without what the environment has added."""


@dataclass(frozen=True)
class Command:
    module: str
    arguments: list[str]
    unbuffered: bool
    folder: str | None
    environment: dict[str, str]
    session: bool
    group: int
    container: list[str]
    """Options of a container of its own; empty for none."""

    @staticmethod
    def of(words: Plain) -> Command | None:
        """From the arguments of Popen._execute_child; None if it is no command of those that are forked."""
        args = words["args"]
        if isinstance(args, str | bytes | os.PathLike) or any(words[name] != PLAIN[name] for name in PLAIN):
            return None
        container, (program, *rest) = split([os.fsdecode(word) for word in args])
        unbuffered = rest[:1] == ["-u"]
        rest = rest[1:] if unbuffered else rest
        if program != sys.executable or rest[:1] != ["-m"] or not _is_forked(rest[1]):
            return None
        env = os.environ if words["env"] is None else words["env"]
        plain = {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}
        folder = None if words["cwd"] is None else os.fsdecode(words["cwd"])
        return Command(rest[1], rest[2:], unbuffered or bool(plain.get("PYTHONUNBUFFERED")), folder, plain,
                       words["start_new_session"], words["process_group"], container)  # fmt: skip


def _is_forked(module: str) -> bool:
    return module == "torch.distributed.run" or module.split(".")[0] in ("everstep", "support")


def main(descriptor: int) -> None:
    _import()
    subprocess.Popen._execute_child = _fork  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as asked:
        while True:
            data, streams, _, _ = socket.recv_fds(asked, 1 << 20, 3)
            if not data:
                return
            asked.send(str(_orphan(pickle.loads(data), streams)).encode())
            for stream in streams:
                os.close(stream)


def _import() -> None:
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.run

    import everstep.launch.cli.run
    import everstep.launch.cli.sweep
    import everstep.trainer.assemble  # noqa: F401
    from everstep import provenance
    from everstep.compose import compose
    from support import TESTS

    torch.set_num_threads(1)
    compose(["experiment=toy"], [str(TESTS / "conf")])  # fills the tables of the parser
    installed = provenance.packages()
    provenance.packages = lambda: installed


def _orphan(command: Command, streams: list[int]) -> int:
    """Fork a process whose parent is gone before it begins, so that it becomes a child of the one that asks."""
    pid_read, pid_write = os.pipe()
    go_read, go_write = os.pipe()
    if (between := os.fork()) == 0:
        os.close(go_write)
        if (pid := os.fork()) == 0:
            os.read(go_read, 1)
            _become(command, streams)
        os.write(pid_write, str(pid).encode())
        os._exit(0)
    os.waitpid(between, 0)
    pid = int(os.read(pid_read, 64))
    for descriptor in (pid_read, pid_write, go_read, go_write):
        os.close(descriptor)
    return pid


def _fork(self: subprocess.Popen[Any], *given: Any) -> None:
    """As Popen's own, which would execute a new Python."""
    words: Plain = SIGNATURE.bind(self, *given).arguments
    command = Command.of(words)
    if command is None:
        EXEC(self, *given)
        return
    streams = [words["p2cread"], words["c2pwrite"], words["errwrite"]]
    if (pid := os.fork()) == 0:
        _become(command, [number if fd == -1 else fd for number, fd in enumerate(streams)], words["preexec_fn"])
    self.pid = pid
    self._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    self._close_pipe_fds(*(words[name] for name in pipes))  # type: ignore[attr-defined]


def _become(command: Command, streams: list[int], before: Callable[[], None] | None = None) -> NoReturn:
    """In the child: be the command. What exec would have cleared is cleared."""
    code = 255
    try:
        _take_streams(streams)
        _forget()
        if command.session:
            os.setsid()
        if command.group >= 0:
            os.setpgid(0, command.group)
        if command.folder is not None:
            os.chdir(command.folder)
        if before is not None:
            before()
        os.environ.clear()
        os.environ.update(command.environment)
        os.environ.setdefault("PYTHONHASHSEED", "0")  # as it is; else the trainer would execute Python again
        _show(command)
        if command.container:
            enter(command.container)
        _open_streams(command.unbuffered)
        _set_path()
        code = _run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _take_streams(streams: list[int]) -> None:
    for number, copy in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(copy, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _forget() -> None:
    """Drop all that belongs to the process that was forked."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.disable()
    atexit._clear()
    atexit.register(_exit_function)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    tempfile.tempdir = None
    sys.excepthook, sys.breakpointhook = sys.__excepthook__, sys.__breakpointhook__
    for name in [name for name, module in sys.modules.items() if _is_users(name, module)]:
        del sys.modules[name]


def _is_users(name: str, module: types.ModuleType) -> bool:
    """True for what lies in a folder of the user's: it may be another one in this process."""
    file = getattr(module, "__file__", None) or ""
    return name.split(".")[0] != "everstep" and file != "" and not file.startswith(tuple(INSTALLED_PATH))


def _show(command: Command) -> None:
    """Put arguments and environment where /proc has them from: over those with which this program was executed."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    words = [sys.executable, "-m", command.module, *command.arguments]
    pairs = [f"{name}={value}" for name, value in command.environment.items()]
    for texts, place in ((words, fields[45:47]), (pairs, fields[47:49])):
        start, end = map(int, place)
        data = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - start]
        ctypes.memmove(start, data.ljust(end - start, b"\0"), end - start)


def _open_streams(unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw: Any = open(number, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
        errors = "backslashreplace" if number == 2 else "strict"
        stream = io.TextIOWrapper(raw, "utf-8", errors, None, number == 2 or os.isatty(number), unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _set_path() -> None:
    here = [] if os.environ.get("PYTHONSAFEPATH") else [os.getcwd()]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*here, *given, *INSTALLED_PATH]


def _run(command: Command) -> int:
    """As Python does for -m, to its end."""
    sys.argv[:] = ["-m", *command.arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    if not hasattr(sys.modules.get(command.module), "__path__"):
        sys.modules.pop(command.module, None)
    code, interrupted = 0, False
    try:
        runpy._run_module_as_main(command.module)  # type: ignore[attr-defined]
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code & 0xFF


if __name__ == "__main__":
    from support import warm_process

    warm_process.main(int(sys.argv[1]))  # not as __main__: what is sent is of a class of that module
