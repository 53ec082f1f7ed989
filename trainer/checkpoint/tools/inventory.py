"""Inventory of a run's checkpoints, committed or not, of damaged files, and their removal. No torch."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from everstep.errors import CheckpointError, ConfigError, StorageError
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder, meant
from everstep.storage import Storage, read_limited
from everstep.storage.names import leads_out
from everstep.trainer.checkpoint.manifest import (
    SET_ASIDE,
    TENSORS,
    CheckpointRef,
    Committed,
    Damaged,
    FileRecord,
    candidates,
    check_format,
    find_fault,
    folders,
    parse_checkpoint,
    parse_name,
    read_manifest,
    signed_run,
)
from everstep.trainer.checkpoint.tensor_table import parse_table

BEST = "best"
"""Used in place of a checkpoint's name."""
THREADS = 8
"""Files that are read in parallel.

They saturate a disk or a network, with one block of each file in memory.
"""


class Kind(enum.Enum):
    committed = "committed"
    superseded = "superseded"
    """Committed, but by an attempt that lost the run: the run continued from an earlier step."""
    set_aside = "set aside"
    orphan = "orphan"
    """Without a manifest: a save that was interrupted, or one that is still pending."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """One folder of a run's checkpoints."""

    path: str
    step: int
    attempt: int
    kind: Kind
    data: bytes = b""
    """The manifest's bytes; empty if it is set aside or missing."""
    run: str | None = None
    """Id that its signature must be for."""

    @property
    def checkpoint(self) -> CheckpointRef | None:
        """The checkpoint as its manifest describes it; None without a manifest."""
        if not self.is_committed:
            return None
        return parse_checkpoint(self.path, self.step, self.attempt, self.data, self.run)

    @property
    def is_committed(self) -> bool:
        return self.kind in (Kind.committed, Kind.superseded)


def survey(run: RunFolder) -> list[ListedCheckpoint]:
    """Return all checkpoint folders of a run, newest first."""
    lineage, run_id = run.lineage(), signed_run(run)
    found = []
    for step, attempt, path in folders(run):
        try:
            data = read_manifest(run.storage, path)
        except FileNotFoundError:
            kind = Kind.set_aside if run.storage.exists(f"{path}/{SET_ASIDE}") else Kind.orphan
            found.append(ListedCheckpoint(path, step, attempt, kind))
            continue
        kind = Kind.committed if lineage.counts(step, attempt) else Kind.superseded
        found.append(ListedCheckpoint(path, step, attempt, kind, data, run_id))
    return found


def split_url(url: str) -> tuple[str, str]:
    """Return (run folder, name of the checkpoint in it) of a URL; the name is empty for the URL of a run.

    RUN/best is the checkpoint with the best held-out metric of that run.
    """
    url = url.rstrip("/")
    head, _, name = (f"./{url}" if url.startswith(f"{CHECKPOINTS}/") else url).rpartition(f"/{CHECKPOINTS}/")
    if head and parse_name(name) is not None:
        return head, name
    head, _, name = url.rpartition("/")
    if head and name == BEST and not RunFolder(url).attempts():
        return head, _best(RunFolder(head))
    return url, ""


def best_step(found: Iterable[ListedCheckpoint]) -> int | None:
    """Return the step of the best held-out metric, from the newest readable checkpoint of the run's line."""
    for each in found:
        checkpoint = each.checkpoint
        if each.kind is Kind.committed and isinstance(checkpoint, Committed):
            return checkpoint.manifest.progress.get("best_step") or None
    return None


def _best(run: RunFolder) -> str:
    found = survey(run)
    step = best_step(found)
    if step is None:
        raise CheckpointError(f"{run.url}/{BEST}: the run has no checkpoint with a held-out metric; set evaluate.every")
    names = [each.path.rpartition("/")[2] for each in found if each.kind is Kind.committed and each.step == step]
    if not names:
        raise CheckpointError(
            f"{run.url}/{BEST}: the best was step {step}, of which no checkpoint is left; set checkpoint.keep_best=1"
        )
    return names[0]


def committed(url: str) -> tuple[RunFolder, list[CheckpointRef]]:
    """Return the committed checkpoints of a run, or the one that the URL names.

    Raises:
        CheckpointError: there is none.
    """
    head, name = split_url(url)
    run = RunFolder(head)
    found = [each.checkpoint for each in survey(run) if not name or each.path == f"{CHECKPOINTS}/{name}"]
    checkpoints = [checkpoint for checkpoint in found if checkpoint is not None]
    if name and not checkpoints:
        raise CheckpointError(f"{url} is not a checkpoint: it has no {MANIFEST}")
    if not checkpoints:
        raise CheckpointError(f"{url} holds no checkpoint{meant(url) or '; is it a run folder?'}")
    return run, checkpoints


def faults(run: RunFolder, checkpoints: Iterable[CheckpointRef]) -> Iterator[tuple[CheckpointRef, list[str]]]:
    """Yield each checkpoint with the faults of its files, in the given order; files are read in parallel."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="verify")
    try:
        jobs = [(found, _verify(pool, run.storage, found)) for found in checkpoints]
        for found, results in jobs:
            yield found, [fault for fault in (each.result() for each in results) if fault]
    finally:
        pool.shutdown(cancel_futures=True)


def _verify(pool: ThreadPoolExecutor, storage: Storage, found: CheckpointRef) -> list[Future[str]]:
    """Begin to verify the files of a checkpoint; each result is the fault of one file, or an empty string."""
    if isinstance(found, Damaged):
        return [pool.submit(str, found.why)]

    def fault(name: str, record: FileRecord) -> str:
        try:
            return find_fault(storage, found.path, [(name, record)])
        except StorageError as error:
            return f"{name} cannot be read: {error}"

    jobs = [pool.submit(fault, *item) for item in sorted(found.manifest.files.items())]
    return [*jobs, pool.submit(_index_fault, storage, found)]


def _index_fault(storage: Storage, found: Committed) -> str:
    """Return the fault of the tensor index: its digest may be right and a tensor not whole all the same."""
    if leads_out(storage, found.path, TENSORS):
        return ""  # said by the check of the file itself
    try:
        table = read_limited(storage, f"{found.path}/{TENSORS}", found.manifest.files[TENSORS].bytes)
    except (FileNotFoundError, StorageError, ValueError):
        return ""  # missing, unreadable or larger than it was: also said there
    try:
        parse_table(table, found.manifest.files)
    except ValueError as error:
        return f"{TENSORS} is damaged: {error}"
    return ""


def named(urls: Iterable[str]) -> list[tuple[RunFolder, list[ListedCheckpoint]]]:
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


def _of(run: RunFolder, paths: list[str]) -> list[ListedCheckpoint]:
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


def selected(run: RunFolder, older_than_step: int | None, orphans: bool) -> list[ListedCheckpoint]:
    """Return the folders that the two rules select, without those that may still be written."""
    chosen = []
    for found in survey(run):
        if found.kind is Kind.orphan:
            if orphans and not _may_be_written(run, found):
                chosen.append(found)
        elif older_than_step is not None and found.step < older_than_step:
            chosen.append(found)
    return chosen


def check_removable(run: RunFolder, doomed: list[ListedCheckpoint], even_the_newest: bool) -> None:
    """Check that the run owns the folders and does not need them to resume.

    Raises:
        CheckpointError: one must not be removed; nothing was removed.
    """
    if not run.attempts():
        raise CheckpointError(f"{run.url} is no run folder: no attempt was ever started there; nothing was removed")
    paths = {found.path for found in doomed if found.kind is Kind.committed}
    if paths and not even_the_newest and (newest := newest_good(run)) in paths:
        raise CheckpointError(
            f"{run.url}/{newest} is the newest checkpoint that verifies, which the run goes on from; "
            "nothing was removed; leave it out, or give --even-the-newest"
        )


def newest_good(run: RunFolder) -> str | None:
    """Return the newest checkpoint that verifies, from which the run would resume."""
    for found in candidates(run):
        check_format(run, found)
        if not any(why for _, why in faults(run, [found])):
            return found.path
    return None


def size(run: RunFolder, found: ListedCheckpoint) -> int:
    """Return the bytes that the removal frees."""
    total = 0
    for name in run.storage.names(found.path):
        # A file removed by retention since it was listed takes no space, nor does a broken link.
        with contextlib.suppress(FileNotFoundError):
            total += run.storage.size(f"{found.path}/{name}")
    return total


def remove(run: RunFolder, found: ListedCheckpoint) -> None:
    """Remove a checkpoint, manifest first.

    An interruption then leaves an orphan, not a damaged checkpoint.
    """
    run.storage.delete(f"{found.path}/{MANIFEST}")
    run.storage.delete(found.path)


def _may_be_written(run: RunFolder, found: ListedCheckpoint) -> bool:
    """True if this may be a pending save: only the newest attempt can still commit one."""
    newest = max(run.attempts(), default=0)
    return found.kind is Kind.orphan and found.attempt >= newest and run.ending(found.attempt) is None
