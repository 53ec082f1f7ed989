"""Code of a folder that is no git checkout: the files that the user names, and their local imports."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

SKIPPED = {"__pycache__", ".git", ".venv", "venv", "node_modules", ".ipynb_checkpoints"}
"""Folders that hold no code of the user."""


def code_of(where: Path, plugins: Sequence[str], scripts: Sequence[str]) -> list[str]:
    """Return the files below `where` of the named packages and scripts, and of modules that they import.

    Installed packages are not taken. Without the imported modules a pod, which has no other copy of them, could not
    import the plug-in, and a queued Slurm job would run later edits of them.
    """
    found = [name for name in scripts if not Path(name).is_absolute() and (where / name).is_file()]
    # Python looks for the modules of a script beside it first.
    search = list(dict.fromkeys([*(str(Path(script).parent) for script in found), "."]))
    named = [Path(name.split(".")[0]) for name in plugins]
    modules = [*named, *_local(where, search, found)]
    for module in modules:  # grows
        files = list(_files(where, module, every=module in named))
        found += files
        modules += [each for each in _local(where, search, files) if each not in modules]
    return found


def _files(where: Path, module: Path, every: bool) -> Iterator[str]:
    """Yield the files of a module.

    Of a folder without __init__.py that is only imported, yield Python files alone: `data`, say, may hold far more.
    """
    if (where / f"{module}.py").is_file():
        yield f"{module}.py"
    every = every or (where / module / "__init__.py").is_file()
    for folder, below, files in os.walk(where / module):
        below[:] = [each for each in below if each not in SKIPPED and not each.startswith(".")]
        for file in files:
            if file.endswith(".py") or (every and not file.endswith(".pyc")):
                yield Path(folder, file).relative_to(where).as_posix()


def _local(where: Path, search: Sequence[str], files: Sequence[str]) -> list[Path]:
    """Return the modules below `where` that these files import."""
    found: dict[Path, None] = {}
    for name in (name for file in files if file.endswith(".py") for name in _imported(where / file)):
        module = next((Path(folder) / name for folder in search if _is_here(where / folder, name)), None)
        if module is not None:
            found[module] = None
    return list(found)


def _imported(file: Path) -> set[str]:
    """Return the top-level names of a file's absolute imports; none if it does not parse."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return set()
    plain = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    of = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module]
    return {name.split(".")[0] for name in (*plain, *of)}


def _is_here(folder: Path, name: str) -> bool:
    """True if Python imports the name from this folder.

    A package without __init__.py gives way to any package elsewhere.
    """
    if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file():
        return True
    if not (folder / name).is_dir():
        return False
    spec = importlib.util.find_spec(name)
    return spec is None or spec.origin is None
