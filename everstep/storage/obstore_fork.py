"""obstore's native library, loaded once per process.

Its runtime (tokio) consists of threads, which a fork does not copy: in a child of a process that has used it, every
call would hang. The runtime cannot be restarted, but the file can be loaded a second time: from a copy in memory, since
the loader identifies a loaded file by its inode. That takes 10 ms and 15 MB in the child.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import sys
import threading
from types import ModuleType
from typing import Any

from everstep.errors import StorageError

_NATIVE = "obstore._obstore"
_inherited: list[Any] = []
"""Modules and clients of parent processes. Never released: a release could wait for lost threads."""
_stale = False
_loading = threading.Lock()


def _note_fork() -> None:
    global _stale, _loading
    _stale = _stale or _NATIVE in sys.modules
    _loading = threading.Lock()  # the old lock may be held by a thread that the fork did not copy


os.register_at_fork(after_in_child=_note_fork)


def obstore() -> ModuleType:
    """Return the package `obstore`, usable in this process; StorageError if a reload after a fork fails."""
    global _stale
    with _loading:
        if _stale:
            _load_again()
            _stale = False
        import obstore

        return obstore


def keep_for_ever(client: Any) -> None:
    """Keep a client from before a fork alive for the life of the process."""
    _inherited.append(client)


def _load_again() -> None:
    old = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "obstore"}
    _inherited.append(old)
    for name in old:
        del sys.modules[name]
    try:
        sys.modules[_NATIVE] = _image(str(old[_NATIVE].__file__))
    except (OSError, ImportError, AttributeError) as error:
        raise StorageError(
            f"cannot load obstore in a forked process ({error}); set EVERSTEP_OBSTORE=0 to go by fsspec"
        ) from error


def _image(file: str) -> ModuleType:
    memory = os.memfd_create("obstore")
    try:
        with open(file, "rb") as source, open(memory, "wb", closefd=False) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        path = f"/proc/self/fd/{memory}"
        loader = importlib.machinery.ExtensionFileLoader(_NATIVE, path)
        spec = importlib.util.spec_from_file_location(_NATIVE, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.__file__ = file  # so that a child of this child finds it
        return module
    finally:
        os.close(memory)
