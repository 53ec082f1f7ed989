"""Whose fault an error is, and which line of the user's code it came from."""

from __future__ import annotations

import bdb
import concurrent.futures
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from everstep.errors import ConfigError, DataError, MachineError, ShortOfMemoryError, StorageError
from everstep.fault import fault_of, place_of, reason_of
from everstep.outcome import Fault
from everstep.storage import LocalStorage


def raised(work: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as found:  # noqa: PT011  SystemExit is one of them
        work()
    return found.value


class ConnectTimeout(Exception):
    """As a client of some service names it."""


MACHINES = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    BrokenPipeError(errno.EPIPE, "pipe"),
    TimeoutError("waited"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EIO, "disk"),
    OSError(errno.ESTALE, "file server"),
    MemoryError(),
    ConnectTimeout("no answer"),
    concurrent.futures.BrokenExecutor("a worker died"),
    torch.OutOfMemoryError("CUDA out of memory"),
    dist.DistNetworkError("gone"),
    dist.DistBackendError("NCCL error in: x.cpp"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MachineError("a node is missing"),
    ShortOfMemoryError("too small", 2),
]
USERS = [
    TypeError("forward() takes 2"),
    KeyError("target"),
    AssertionError(),
    ZeroDivisionError("division by zero"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    NotImplementedError("connection reset"),
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "not yours"),
    IndexError("worker 3 killed"),
    SystemExit(3),
    ConfigError("steps=0"),
    DataError("damaged"),
    StorageError("no such bucket"),
]


@pytest.mark.parametrize("error", MACHINES, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_what_a_machine_does_may_be_over_when_the_run_starts_again(error: BaseException) -> None:
    assert fault_of(error) is Fault.machine


@pytest.mark.parametrize("error", USERS, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_what_the_users_code_does_would_come_again(error: BaseException) -> None:
    assert fault_of(error) is Fault.user


def test_an_error_that_came_of_a_machines_fault_is_the_machines() -> None:
    def from_another() -> None:
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError as error:
            raise ValueError("no batch") from error

    def while_handling() -> None:
        try:
            raise OSError(errno.EIO, "disk")
        except OSError:
            raise KeyError("batch")  # noqa: B904

    assert fault_of(raised(from_another)) is fault_of(raised(while_handling)) is Fault.machine


def test_who_leaves_the_debugger_has_made_no_mistake() -> None:
    assert fault_of(bdb.BdbQuit()) is Fault.left


@pytest.mark.parametrize(("number", "passing"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EPERM, True),
                                                 (errno.EACCES, False)])  # fmt: skip
def test_a_full_disk_may_have_room_again_and_a_forbidden_folder_stays_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passing: bool
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuses)
    error = raised(lambda: LocalStorage(str(tmp_path)).write("file", b"1"))
    assert isinstance(error, StorageError)
    assert fault_of(error) is (Fault.machine if passing else Fault.user)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's, in the current folder."""
    (tmp_path / "task_of_mine.py").write_text(
        "import json\n\ndef loss(text):\n    return json.loads(text)\n\ndef model():\n    return [].nothing\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "task_of_mine", raising=False)
    import task_of_mine

    return task_of_mine


def test_the_place_is_the_innermost_line_of_the_user(users: ModuleType) -> None:
    assert place_of(raised(users.model)) == "task_of_mine.py:7, in model"
    assert place_of(raised(lambda: users.loss("{"))) == "task_of_mine.py:4, in loss"  # not that of json


def test_a_package_of_the_user_may_be_installed_like_any_other(
    users: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(Path("task_of_mine.py").read_text(), "/usr/lib/python3/site-packages/mine/tasks.py", "exec")
    scope: dict[str, Callable[[], object]] = {"__name__": "mine.tasks"}  # type: ignore[dict-item]
    exec(code, scope)
    error = raised(scope["model"])
    assert place_of(error, ["mine"]) == "/usr/lib/python3/site-packages/mine/tasks.py:7, in model"
    assert "mine" not in place_of(error)


def test_a_slip_of_syntax_is_found_in_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slip.py").write_text("x = 1\nif x\n")
    error = raised(lambda: compile((tmp_path / "slip.py").read_text(), "slip.py", "exec"))
    assert place_of(error) == "slip.py:2"


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert reason_of(ValueError("first\n  second")) == "ValueError: first second"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(ValueError("x" * 9000))) < 500
