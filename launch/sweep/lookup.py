"""Look-up of a sweep's folder by the name that a user types."""

from __future__ import annotations

from everstep.errors import ConfigError, nearest
from everstep.launch.runs.lookup import is_run, names
from everstep.launch.sweep.sweep_folder import SWEEP, SweepFolder
from everstep.storage import join_url, open_storage


def sweep_at(word: str, root: str) -> SweepFolder | None:
    """Return the sweep of that name, path or URL; None when there is none."""
    urls = [word.rstrip("/")] if "://" in word or "/" in word else [join_url(root, word), word]
    return next((SweepFolder(url) for url in urls if open_storage(url).exists(SWEEP)), None)


def find_sweep(word: str, root: str) -> SweepFolder:
    """Return the sweep's folder. ConfigError with the nearest name when there is none."""
    found = sweep_at(word, root)
    if found is None and is_run(open_storage(join_url(root, word)).names()):
        raise ConfigError(f"{word} is a run and no sweep; 'everstep status {word}' shows it")
    if found is None:
        hint = nearest(word, names(root)) or f"; 'everstep ls {root}' shows which runs there are"
        raise ConfigError(f"{word}: there is no such sweep in {root}{hint}")
    return found
