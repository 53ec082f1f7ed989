"""Record of the code that an attempt loaded: digests of the user's modules and of Everstep."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

MODULES = "code.json"
"""File of an attempt."""
LIBRARIES = ("torch", "numpy")
"""Packages whose version decides the last bits of a result."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages."""


def loaded_code(plugins: Sequence[str]) -> dict[str, Any]:
    """Return digests of the user's loaded modules and of Everstep, and the versions beneath them.

    Args:
        plugins: packages that are the user's wherever they are installed.
    """
    versions = {name: str(getattr(sys.modules[name], "__version__", "")) for name in LIBRARIES if name in sys.modules}
    return {
        "modules": {name: blake3(path.read_bytes()).hexdigest() for name, path in sorted(_own_modules(plugins))},
        "everstep": _everstep(),
        "versions": {"python": platform.python_version(), **versions},
    }


def code_changes(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield what differs between two records, a line each."""
    old, new = then.get("modules", {}), now.get("modules", {})
    yield from (f"module {name} was edited" for name in sorted(old.keys() & new.keys()) if old[name] != new[name])
    if then.get("everstep") != now.get("everstep"):
        yield "Everstep itself was edited, or is another version"
    before, after = then.get("versions", {}), now.get("versions", {})
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    yield from (f"{name} is {after.get(name)}, was {before.get(name)}" for name in changed)


def _own_modules(plugins: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and file of the loaded modules that are not of Python, a library or Everstep."""
    named = {name.split(".")[0] for name in plugins}
    stdlib = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
    for name, module in list(sys.modules.items()):
        path, top = getattr(module, "__file__", None) or "", name.split(".")[0]
        if not path.endswith(".py") or top in ("__main__", "__mp_main__", "everstep") or not os.path.isfile(path):
            continue
        is_library = not INSTALLED.isdisjoint(Path(path).parts) or os.path.realpath(path).startswith(stdlib)
        if top in named or not is_library:
            yield name, Path(path)


def _everstep() -> str:
    """Return one digest of all Python files of the package."""
    import everstep

    total = blake3()
    root = Path(str(everstep.__file__)).parent
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(each for each in below if each != "__pycache__")
        for file in sorted(files):
            if file.endswith(".py"):
                total.update(f"{os.path.relpath(folder, root)}/{file}\0".encode())
                total.update(Path(folder, file).read_bytes())
    return total.hexdigest()
