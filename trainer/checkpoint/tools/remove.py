"""Removal of checkpoints by the user: the selection, its limits, and manifest first. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import candidates, check_format
from everstep.trainer.checkpoint.tools.inventory import Found, Kind, faults, split_url, survey


def named(urls: Iterable[str]) -> list[tuple[RunFolder, list[Found]]]:
    """Return the folders that the URLs name, by run.

    Raises:
        ConfigError: a URL does not name a checkpoint.
        CheckpointError: a checkpoint does not exist, or may still be written.
    """
    by_run: dict[str, list[str]] = {}
    for url in urls:
        head, name = split_url(url)
        if not name:
            raise ConfigError(
                f"{url} is no checkpoint: give RUN/{CHECKPOINTS}/step-N-attempt-M, or RUN with --older-than-step or "
                "--orphans"
            )
        by_run.setdefault(head, []).append(f"{CHECKPOINTS}/{name}")
    return [(run, _of(run, paths)) for run, paths in ((RunFolder(head), paths) for head, paths in by_run.items())]


def _of(run: RunFolder, paths: list[str]) -> list[Found]:
    found = {each.path: each for each in survey(run)}
    for path in paths:
        if path not in found:
            raise CheckpointError(f"{run.url}/{path} does not exist")
        if _may_be_written(run, found[path]):
            raise CheckpointError(
                f"attempt {found[path].attempt} has not ended and may be writing {run.url}/{path}; "
                "stop it first, or start the run again: the next attempt removes it"
            )
    return [found[path] for path in dict.fromkeys(paths)]


def selected(run: RunFolder, older_than_step: int | None, orphans: bool) -> list[Found]:
    """Return the folders that the two rules select, without those that may still be written."""
    chosen = []
    for found in survey(run):
        if found.kind is Kind.orphan:
            if orphans and not _may_be_written(run, found):
                chosen.append(found)
        elif older_than_step is not None and found.step < older_than_step:
            chosen.append(found)
    return chosen


def check_removable(run: RunFolder, doomed: list[Found], even_the_newest: bool) -> None:
    """Check that the run owns the folders and does not need them to resume.

    Raises:
        CheckpointError: one must not be removed; nothing was removed.
    """
    if not run.attempts():
        raise CheckpointError(f"{run.url} is no run folder: no attempt was ever started there; nothing was removed")
    for found in doomed:
        local = run.storage.path(found.path)
        if local is not None and local.is_symlink():
            raise CheckpointError(f"{run.url}/{found.path} is a link to another place; nothing was removed")
    paths = {found.path for found in doomed if found.kind is Kind.committed}
    if paths and not even_the_newest and (newest := newest_good(run)) in paths:
        raise CheckpointError(
            f"{run.url}/{newest} is the newest checkpoint that verifies, which the run goes on from; "
            "nothing was removed; leave it out, or give --even-the-newest"
        )


def newest_good(run: RunFolder) -> str | None:
    """Return the newest checkpoint that verifies, from which the run would resume."""
    for candidate in candidates(run):
        check_format(run, candidate)
        if not any(why for _, why in faults(run, [candidate])):
            return candidate.path
    return None


def size(run: RunFolder, found: Found) -> int:
    """Return the bytes that the removal frees."""
    total = 0
    for name in run.storage.names(found.path):
        # A file removed by retention since it was listed takes no space, nor does a broken link.
        with contextlib.suppress(FileNotFoundError):
            total += run.storage.size(f"{found.path}/{name}")
    return total


def remove(run: RunFolder, found: Found) -> None:
    """Remove a checkpoint, manifest first.

    An interruption then leaves an orphan, not a damaged checkpoint.
    """
    run.storage.delete(f"{found.path}/{MANIFEST}")
    run.storage.delete(found.path)


def _may_be_written(run: RunFolder, found: Found) -> bool:
    """True if this may be a pending save: only the newest attempt can still commit one."""
    newest = max(run.attempts(), default=0)
    return found.kind is Kind.orphan and found.attempt >= newest and run.ending(found.attempt) is None
