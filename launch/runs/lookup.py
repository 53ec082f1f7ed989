"""Look-up of a run's folder by a name in the folder of runs, a path or a URL."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from everstep.config import RunConfig
from everstep.errors import ConfigError, nearest
from everstep.run_folder import ATTEMPTS, CONFIG, JOB, SUBMISSIONS, RunFolder
from everstep.storage import join_url, open_storage

SIGNS = {CONFIG, JOB, ATTEMPTS, SUBMISSIONS}
"""Entries that mark a run folder; one is enough."""
ROOT = RunConfig().run_root


def add_run(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the arguments that select a run."""
    parser.add_argument("run", nargs="+" if several else None, metavar="RUN", help="a name, a path or a URL")
    add_root(parser)


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", default=ROOT, metavar="URL", help=f"folder of runs that names are looked up in ({ROOT})"
    )


def find(word: str, root: str = ROOT) -> RunFolder:
    """Return the folder of a run; ConfigError with the nearest name when there is none."""
    spelled_out = "://" in word or "/" in word or is_run(open_storage(word).names())
    folder = RunFolder(word.rstrip("/")) if spelled_out else RunFolder(join_url(root, word))
    if is_run(folder.storage.names()):
        return folder
    above, name = (folder.url.rpartition("/")[::2]) if spelled_out else (root, word)
    hint = nearest(name, names(above or ".")) or f"; 'everstep ls {above}' shows which there are"
    raise ConfigError(f"{word}: there is no such run in {above or '.'}{hint}")


def is_run(names: Iterable[str]) -> bool:
    return not SIGNS.isdisjoint(names)


def names(root: str) -> list[str]:
    """Return the names in a folder of runs, without hidden ones."""
    return [name for name in open_storage(root).names() if not name.startswith(".")]


def is_local(root: str) -> bool:
    return "://" not in root and Path(root).is_dir()
