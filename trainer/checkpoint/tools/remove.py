"""Removing checkpoints by hand: which go, what must stay, and manifest first. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import candidates, check_format
from everstep.trainer.checkpoint.tools.inventory import Found, Kind, faults, split_url, survey


def named(urls: Iterable[str]) -> list[tuple[RunFolder, list[Found]]]:
    """The folders that the URLs name, by run; CheckpointError for what is no checkpoint of a run."""
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
    """What the two rules name; folders that may be growing right now are left alone."""
    chosen = []
    for found in survey(run):
        if found.kind is Kind.orphan:
            if orphans and not _may_be_written(run, found):
                chosen.append(found)
        elif older_than_step is not None and found.step < older_than_step:
            chosen.append(found)
    return chosen


def check_removable(run: RunFolder, doomed: list[Found], even_the_newest: bool) -> None:
    """Raise CheckpointError rather than remove what is not the run's own, or what it would go on from."""
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
    """The newest checkpoint that verifies, which the run goes on from."""
    for candidate in candidates(run):
        check_format(run, candidate)
        if not any(why for _, why in faults(run, [candidate])):
            return candidate.path
    return None


def size(run: RunFolder, found: Found) -> int:
    """Bytes that its removal gives back."""
    total = 0
    for name in run.storage.names(found.path):
        # A file that retention removed since it was listed takes no room, nor does a link to nothing.
        with contextlib.suppress(FileNotFoundError):
            total += run.storage.size(f"{found.path}/{name}")
    return total


def remove(run: RunFolder, found: Found) -> None:
    """The manifest goes first: whatever interrupts this leaves an orphan, never half a checkpoint."""
    run.storage.delete(f"{found.path}/{MANIFEST}")
    run.storage.delete(found.path)


def _may_be_written(run: RunFolder, found: Found) -> bool:
    """Whether this is a save that may be under way: only the newest attempt can still commit one."""
    newest = max(run.attempts(), default=0)
    return found.kind is Kind.orphan and found.attempt >= newest and run.ending(found.attempt) is None
