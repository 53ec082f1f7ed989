"""A save has the same result on all ranks, whichever of them fails and wherever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from torch.distributed import HashStore

from everstep.errors import CheckpointError, SupersededError
from everstep.trainer.checkpoint.manifest import FileRecord, Files
from everstep.trainer.checkpoint.pending_save import PendingSave, SaveCoordinator, SaveRecord


@dataclass
class Target:
    """A target that notes its calls, and raises in one of them."""

    rank: int
    raises: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    files: Files = field(default_factory=dict)

    def write(self) -> Files:
        self._call("write")
        return {f"file-{self.rank}": FileRecord(self.rank, "digest")}

    def commit(self, files: Files) -> str:
        self._call("commit")
        self.files = files
        return "payload"

    def seal(self, payload: str) -> None:
        self._call(f"seal {payload}")

    def after(self) -> None:
        self._call("after")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.raises:
            raise self.raises[name]


def save(*targets: Target, timeout_s: float = 60.0, silent: int | None = None) -> list[PendingSave]:
    """One save of as many ranks as there are targets; `silent` takes no part."""
    store = HashStore() if len(targets) > 1 else None
    saves = [
        PendingSave(SaveRecord(4, 10, 0.0), target, SaveCoordinator(store, target.rank, len(targets)), timeout_s)
        for target in targets
        if target.rank != silent
    ]
    assert all(each.wait(60.0) for each in saves)
    return saves


@pytest.mark.parametrize("world", [1, 3])
def test_rank_0_commits_the_files_of_all_and_every_rank_seals(world: int) -> None:
    targets = [Target(rank) for rank in range(world)]
    saves = save(*targets)
    assert targets[0].files == {f"file-{rank}": FileRecord(rank, "digest") for rank in range(world)}
    assert targets[0].calls == ["write", "commit", "seal payload", "after"]
    assert all(target.calls == ["write", "seal payload", "after"] for target in targets[1:])
    assert [(each.error(), each.record.error) for each in saves] == [(None, "")] * world
    assert all(each.record.seconds > 0 for each in saves)


@pytest.mark.parametrize(("rank", "call"), [(0, "write"), (1, "write"), (0, "commit")])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), SupersededError("attempt 2 has taken over")])
def test_an_error_of_one_rank_is_the_result_on_all(rank: int, call: str, error: Exception) -> None:
    targets = [Target(0), Target(1)]
    targets[rank].raises[call] = error
    for each in save(*targets):
        assert type(each.error()) is (SupersededError if isinstance(error, SupersededError) else CheckpointError)
        assert str(each.error()) == each.record.error == str(error)
    assert not any(name.startswith(("seal", "after")) for target in targets for name in target.calls)


def test_a_rank_that_does_not_report_in_time_is_named() -> None:
    (main,) = save(Target(0), Target(1), timeout_s=0.05, silent=1)
    assert str(main.error()) == "rank 1 has not written its part within 0 s"


def test_a_seal_that_fails_on_one_rank_changes_the_result_on_none() -> None:
    targets = [Target(0), Target(1, {"seal payload": OSError(28, "No space left")})]
    assert [each.error() for each in save(*targets)] == [None, None]
