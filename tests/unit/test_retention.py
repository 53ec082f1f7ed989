"""What an attempt keeps and removes as it saves, and how little it reads for that."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from everstep.config import CheckpointConfig
from everstep.run_folder import CHECKPOINTS, MANIFEST, RunFolder
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint.manifest import SET_ASIDE, TENSORS, FileRecord, Manifest, candidates
from everstep.trainer.checkpoint.retention import Retention


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose first attempt has committed steps 1 to 5; a second has just begun."""
    run = RunFolder(str(tmp_path / "run"))
    run.claim({})
    for step in range(1, 6):
        commit(run, step, 1)
    run.claim({})
    return run


def commit(run: RunFolder, step: int, attempt: int, metric: float | None = None) -> tuple[str, Manifest]:
    record = Manifest(
        step=step, attempt=attempt, samples=step, world=1, parallel="single", time=0.0, config_digest="c",
        data_digest="d", progress={}, values={}, metric=metric, files={TENSORS: FileRecord(0, "0")},
    )  # fmt: skip
    path = run.checkpoint(step, attempt)
    run.storage.write(f"{path}/{TENSORS}", b"")
    run.storage.create(f"{path}/{MANIFEST}", record.to_json())
    return path, record


def restored(run: RunFolder, step: int = 5, attempt: int = 2, keep_last: int = 2, keep_best: int = 0) -> Retention:
    """The second attempt, gone on from a checkpoint of the first."""
    found = [candidate for candidate in candidates(run) if candidate.step <= step]
    run.record_restored(attempt, step, 1)
    retention = Retention(run, attempt, CheckpointConfig(keep_last=keep_last, keep_best=keep_best), maximise=False)
    retention.found(found)
    return retention


def left(run: RunFolder) -> list[tuple[int, int]]:
    names = (name.split("-") for name in run.storage.names(CHECKPOINTS))
    return [(int(words[1]), int(words[3])) for words in names]


def test_a_save_lists_once_and_reads_no_manifest_that_is_known(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    retention = restored(run, keep_last=3)
    retention.committed(*commit(run, 6, 2))
    calls: Counter[str] = Counter()
    for verb in ("read", "names", "exists", "size"):
        original = getattr(LocalStorage, verb)

        def counted(self: LocalStorage, path: str = "", verb: str = verb, original: object = original) -> object:
            calls[verb] += 1
            return original(self, path)  # type: ignore[operator]

        monkeypatch.setattr(LocalStorage, verb, counted)
    for step in (7, 8, 9):
        new = commit(run, step, 2)
        calls.clear()
        retention.committed(*new)
        assert calls == {"names": 1}
    assert left(run) == [(7, 2), (8, 2), (9, 2)]


def test_what_was_there_at_the_restore_counts(run: RunFolder) -> None:
    retention = restored(run, keep_last=3)
    retention.committed(*commit(run, 6, 2))
    assert left(run) == [(4, 1), (5, 1), (6, 2)]


def test_an_attempt_that_restored_nothing_learns_what_is_there_once(run: RunFolder) -> None:
    retention = Retention(run, 2, CheckpointConfig(keep_last=2, keep_best=0), maximise=False)
    retention.committed(*commit(run, 6, 2))
    assert left(run) == [(5, 1), (6, 2)]


def test_the_best_stays_though_it_is_old(run: RunFolder) -> None:
    retention = restored(run, keep_last=1, keep_best=1)
    for step, metric in ((6, 0.5), (7, 0.1), (8, 0.9), (9, float("nan"))):
        retention.committed(*commit(run, step, 2, metric))
    assert left(run) == [(7, 2), (9, 2)]


def test_what_older_attempts_left_half_written_goes_and_what_this_one_writes_stays(run: RunFolder) -> None:
    retention = restored(run)
    for attempt in (1, 2, 3):
        run.storage.write(f"{run.checkpoint(7, attempt)}/rank-0000.tensors", b"half")
    retention.committed(*commit(run, 6, 2))
    assert left(run) == [(5, 1), (6, 2), (7, 2), (7, 3)]


def test_what_is_set_aside_or_off_the_line_is_left_alone(run: RunFolder) -> None:
    retention = restored(run, step=3, keep_last=1)
    run.storage.move(f"{run.checkpoint(5, 1)}/{MANIFEST}", f"{run.checkpoint(5, 1)}/{SET_ASIDE}")
    for step in (6, 7):
        retention.committed(*commit(run, step, 2))
    assert left(run) == [(4, 1), (5, 1), (7, 2)]


def test_a_manifest_that_cannot_be_read_says_nothing_about_what_may_go(run: RunFolder) -> None:
    run.storage.write(f"{run.checkpoint(1, 1)}/{MANIFEST}", b"{")
    for retention in (restored(run), Retention(run, 2, CheckpointConfig(keep_last=2, keep_best=0), maximise=False)):
        retention.committed(*commit(run, 6, 2))
        assert left(run) == [(1, 1), (5, 1), (6, 2)]


def test_the_one_just_written_stays_though_a_damaged_one_has_a_higher_step(run: RunFolder) -> None:
    retention = restored(run, keep_last=1)
    retention.committed(*commit(run, 8, 2))
    retention.committed(*commit(run, 6, 2))  # gone back past 8, which was damaged
    assert (6, 2) in left(run)


def test_what_was_removed_by_hand_does_not_count_as_kept(run: RunFolder) -> None:
    retention = restored(run, keep_last=2)
    retention.committed(*commit(run, 6, 2))
    run.storage.delete(run.checkpoint(6, 2))
    retention.committed(*commit(run, 7, 2))
    assert left(run) == [(5, 1), (7, 2)]
