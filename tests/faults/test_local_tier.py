"""Checkpoints on the nodes' own disks: the loss of any one node loses no step that they had."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from everstep.control_group import Usage
from everstep.storage import LocalStorage
from everstep.trainer.checkpoint import copy_schedule, node_room
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.copy_schedule import CopySchedule, Plan
from everstep.trainer.checkpoint.manifest import candidates
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.run_folder_target import RunFolderTarget
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_lines
from support import kill_points
from support.ranks import Ranks, folder, ledger, train
from support.toy import plain_data

pytestmark = pytest.mark.dist
STEPS = 12
TIERS = ("checkpoint=two_tiers", "checkpoint.every=6", "checkpoint.local.every=2",
         "checkpoint.local.path=$LOCAL_SCRATCH", "checkpoint.keep_best=0")  # fmt: skip


def train_on(nodes: Sequence[int], root: Path, *overrides: str, trap: Callable[[int], None] | None = None,
             run: str = "toy") -> Ranks:  # fmt: skip
    """One rank for each entry of `nodes`, which says on which node it is; every node has a disk of its own."""

    def before(rank: int) -> None:
        os.environ.update(GROUP_RANK=str(nodes[rank]), LOCAL_SCRATCH=str(disk(root, nodes[rank])))
        if trap is not None:
            trap(rank)

    return train(len(nodes), root, *TIERS, *overrides, run=run, before=before)


def disk(root: Path, node: int) -> Path:
    return root / f"node-{node}"


def restored(root: Path, attempt: int) -> int:
    return int(json.loads((root / f"toy/attempts/{attempt:04d}/restored.json").read_text())["step"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train_on([0, 1], root).codes == [0, 0]
    return root


def killed_in(step: int, root: Path, *overrides: str) -> None:
    """Two nodes of one rank each, all killed in a step; what was saved locally before is complete."""

    def trap(rank: int) -> None:
        finish_each_save()
        kill_points.in_step(step)

    assert train_on([0, 1], root, *overrides, trap=trap).codes == [-9, -9]


def finish_each_save() -> None:
    """So that it is known which checkpoints are there."""
    original = Checkpointer.save

    def save(self: Checkpointer, local: bool = False, last: bool = False) -> bool:
        return original(self, local, last) and self.finish()

    Checkpointer.save = save  # type: ignore[method-assign]


def assert_same_run(root: Path, undisturbed: Path) -> None:
    assert ledger(root) == ledger(undisturbed)
    assert list(differences(locate(folder(root).url), locate(folder(undisturbed).url))) == []


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("lost", [None, 0, 1])
def test_the_loss_of_one_node_loses_no_step_that_was_saved_locally(
    undisturbed: Path, tmp_path: Path, lost: int | None, kind: str
) -> None:
    killed_in(12, tmp_path, f"parallel={kind}")
    if lost is not None:
        shutil.rmtree(disk(tmp_path, lost))
    ended = train_on([0, 1], tmp_path, f"parallel={kind}")
    assert ended.codes == [0, 0], ended.printed
    assert restored(tmp_path, 2) == 10
    if kind == "ddp":
        assert_same_run(tmp_path, undisturbed)
    else:
        assert ledger(tmp_path) == ledger(undisturbed)


@pytest.mark.parametrize("nodes", [[0], [0, 0], [1, 2, 5], [0, 0, 1, 1]])
def test_other_nodes_and_ranks_go_on_from_the_parts_of_those_that_are_left(
    undisturbed: Path, tmp_path: Path, nodes: list[int]
) -> None:
    killed_in(12, tmp_path, "parallel=fsdp")
    if 1 not in nodes:
        shutil.rmtree(disk(tmp_path, 1))
    ended = train_on(nodes, tmp_path, f"parallel={'fsdp' if len(nodes) > 1 else 'single'}")
    assert ended.codes == [0] * len(nodes), ended.printed
    assert restored(tmp_path, 2) == 10
    assert ledger(tmp_path) == ledger(undisturbed)


def test_with_all_nodes_lost_the_run_folder_has_the_newest(undisturbed: Path, tmp_path: Path) -> None:
    killed_in(12, tmp_path)
    for node in (0, 1):
        shutil.rmtree(disk(tmp_path, node))
    assert train_on([0, 1], tmp_path).codes == [0, 0]
    assert restored(tmp_path, 2) == 6
    assert_same_run(tmp_path, undisturbed)


def test_the_run_folder_goes_first_where_it_is_newer(undisturbed: Path, tmp_path: Path) -> None:
    killed_in(8, tmp_path)
    assert train_on([0, 1], tmp_path).codes == [0, 0]
    assert restored(tmp_path, 2) == 6
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["rank-0000.tensors", "rank-0001.tensors", "tensors.json"])
def test_a_part_that_is_damaged_on_both_nodes_sends_the_run_back(undisturbed: Path, tmp_path: Path, name: str) -> None:
    killed_in(12, tmp_path)
    for path in tmp_path.glob(f"node-*/*/step-00000010-*/{name}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    ended = train_on([0, 1], tmp_path)
    assert ended.codes == [0, 0], ended.printed
    assert restored(tmp_path, 2) == 8
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("point", "victim"), [
    (kill_points.before_write, 1), (kill_points.after_report, 0), (kill_points.after_collect, 0),
    (kill_points.before_announce, 0), (kill_points.after_announce, 0), (kill_points.after_result, 1),
])  # fmt: skip
def test_a_kill_in_the_middle_of_a_local_save_loses_nothing(
    undisturbed: Path, tmp_path: Path, point: Callable[[int], None], victim: int
) -> None:
    train_on([0, 1], tmp_path, trap=lambda rank: point(2) if rank == victim else None)
    assert train_on([0, 1], tmp_path).codes == [0, 0]
    assert_same_run(tmp_path, undisturbed)


def test_a_run_that_is_done_leaves_nothing_on_the_nodes(undisturbed: Path) -> None:
    assert list(undisturbed.glob("node-*/*/*")) == []
    assert [c.step for c in candidates(folder(undisturbed))] == [12, 6]


def test_a_full_node_costs_local_checkpoints_and_nothing_else(undisturbed: Path, tmp_path: Path) -> None:
    def trap(rank: int) -> None:
        if rank == 1:
            original = LocalStorage.writer

            def full(self: LocalStorage, path: str):  # type: ignore[no-untyped-def]
                if "node-" in self.url:
                    raise OSError(28, "No space left on device")
                return original(self, path)

            LocalStorage.writer = full  # type: ignore[method-assign]

    assert train_on([0, 1], tmp_path, trap=trap).codes == [0, 0]
    failed = [event for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "save_failed"]
    assert failed
    assert all("No space left" in event["line"] and "on the nodes" in event["line"] for event in failed)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("grace_s", "local"), [(0.0, True), (1000.0, False)])
def test_a_stop_with_little_time_left_saves_on_the_nodes(
    undisturbed: Path, tmp_path: Path, grace_s: float, local: bool
) -> None:
    from everstep.trainer.step import Stepper

    def trap(rank: int) -> None:
        original = Stepper.__call__

        def stopping(self: Stepper, batches: Sequence[object]) -> None:
            if self.state.progress.step == 8 and rank == 1:
                self.stop._ask("the test")
            original(self, batches)  # type: ignore[arg-type]

        Stepper.__call__ = stopping  # type: ignore[method-assign]

    assert train_on([0, 1], tmp_path, f"stop.grace_s={grace_s}", trap=trap).codes == [75, 75]
    decided = [event for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "last_save"]
    assert [event["local"] for event in decided] == [local]
    assert next(candidates(folder(tmp_path))).step == (6 if local else 9)
    assert train_on([0, 1], tmp_path).codes == [0, 0]
    assert restored(tmp_path, 2) == 9
    assert_same_run(tmp_path, undisturbed)


# ------------------------------------------------------------------ copies as often as the time allows

AUTOMATIC = ("checkpoint.local.every=auto", "checkpoint.every=100")


def train_with_copies(nodes: Sequence[int], root: Path, *overrides: str, trap: Callable[[int], None] | None = None,
                      run: str = "toy") -> Ranks:  # fmt: skip
    """Copies every two steps from the third on, whatever they cost."""

    def before(rank: int) -> None:
        copy_schedule.FIRST_STEPS = 1
        CopySchedule.next_plan = lambda self, step: Plan(step + 2, 2)  # type: ignore[method-assign]
        finish_each_save()
        if trap is not None:
            trap(rank)

    return train_on(nodes, root, *AUTOMATIC, *overrides, run=run, trap=before)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_killed_rank_costs_the_steps_since_the_last_copy(
    undisturbed: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    """Also on another world size on the same node."""
    trap = lambda rank: kill_points.in_step(10) if rank == 1 else None  # noqa: E731
    killed = train_with_copies([0, 0], tmp_path, f"parallel={kind}", trap=trap)
    assert killed.codes[1] == -9
    assert list(candidates(folder(tmp_path))) == []
    ended = train_with_copies([0] * ranks, tmp_path, f"parallel={kind if ranks > 1 else 'single'}")
    assert ended.codes == [0] * ranks, ended.printed
    assert restored(tmp_path, 2) == 9
    if (kind, ranks) == ("ddp", 2):
        assert_same_run(tmp_path, undisturbed)
    else:
        assert ledger(tmp_path) == ledger(undisturbed)
    assert list(tmp_path.glob("node-*/*")) == []  # a run that is done leaves nothing


def test_copies_of_several_nodes_have_no_replicas_and_serve_while_no_node_is_lost(
    undisturbed: Path, tmp_path: Path
) -> None:
    trap = lambda rank: kill_points.in_step(10)  # noqa: E731
    assert train_with_copies([0, 1], tmp_path, trap=trap).codes == [-9, -9]
    (copy,) = tmp_path.glob("node-0/*/step-00000009-*")
    assert not (copy / "rank-0001.tensors").exists()
    assert train_with_copies([0, 1], tmp_path).codes == [0, 0]
    assert restored(tmp_path, 2) == 9
    assert_same_run(tmp_path, undisturbed)


def test_a_node_without_room_gets_no_copies_and_one_line_in_the_log(undisturbed: Path, tmp_path: Path) -> None:
    def trap(rank: int) -> None:
        node_room.free_bytes = lambda folder: 1000

    assert train_with_copies([0, 0], tmp_path, trap=trap).codes == [0, 0]
    assert not [event for event in read_lines(folder(tmp_path), "events.jsonl") if event["event"] == "saved_locally"]
    log = folder(tmp_path).storage.read("attempts/0001/rank-0000.log").decode()
    assert log.count("no copies on this node, a lost process costs up to checkpoint.every steps: a copy takes") == 1
    assert_same_run(tmp_path, undisturbed)


def test_a_folder_for_copies_that_another_user_could_read_costs_the_copies_and_nothing_else(tmp_path: Path) -> None:
    disk(tmp_path, 0).mkdir()
    disk(tmp_path, 0).chmod(0o777)
    ended = train_with_copies([0, 0], tmp_path, f"checkpoint.local.path={disk(tmp_path, 0)}/inner")
    assert ended.codes == [0, 0], ended.printed
    log = folder(tmp_path).storage.read("attempts/0001/rank-0000.log").decode()
    assert log.count("no copies on this node") == 1
    assert "no copies" not in ended.printed


def test_a_save_to_a_store_that_hangs_is_not_waited_for_by_a_copy(undisturbed: Path, tmp_path: Path) -> None:
    """The save of step 6 hangs until step 11: a copy that waited for it would wait for ever."""
    from everstep.trainer.step import Stepper

    def trap(rank: int) -> None:
        reached, write, step = threading.Event(), RunFolderTarget.write, Stepper.__call__

        def hanging(self: RunFolderTarget) -> object:
            reached.wait(100)
            return write(self)

        def stepping(self: Stepper, batches: Sequence[object]) -> None:
            if self.state.progress.step == 10:
                reached.set()
            step(self, batches)  # type: ignore[arg-type]

        RunFolderTarget.write = hanging  # type: ignore[method-assign, assignment]
        Stepper.__call__ = stepping  # type: ignore[method-assign]
        Checkpointer.save = unwaited  # type: ignore[method-assign]

    unwaited = Checkpointer.save
    assert train_with_copies([0, 0], tmp_path, "checkpoint.every=6", trap=trap).codes == [0, 0]
    assert_same_run(tmp_path, undisturbed)


def test_another_run_in_a_folder_of_the_same_name_does_not_go_on_from_the_copies(
    undisturbed: Path, tmp_path: Path
) -> None:
    assert train_with_copies([0, 0], tmp_path, trap=lambda rank: kill_points.in_step(10)).codes == [-9, -9]
    shutil.rmtree(tmp_path / "toy")
    assert train_with_copies([0, 0], tmp_path).codes == [0, 0]
    assert restored(tmp_path, 1) == 0
    assert_same_run(tmp_path, undisturbed)


def test_copies_do_not_decide_how_far_a_rollback_goes(tmp_path: Path) -> None:
    """The time decides when copies are made; what a run computes must not depend on it."""
    plain, copied = tmp_path / "plain", tmp_path / "copied"
    for root in (plain, copied):
        root.mkdir()
    asked = ("checkpoint.every=6", "data._target_=support.toy.plain_data", "nonfinite.policy=rollback")
    assert train_on([0, 0], plain, *asked, "checkpoint.local.every=null").codes == [0, 0]
    ids = ledger(plain)[5]
    poison = f"task.nan_value={float(plain_data().train.columns['x'][ids[0], 0])!r}"
    assert train_on([0, 0], plain, *asked, poison, "checkpoint.local.every=null", run="poisoned").codes == [0, 0]
    assert train_with_copies([0, 0], copied, *asked, poison, run="poisoned").codes == [0, 0]
    for root in (plain, copied):
        events = read_lines(folder(root, "poisoned"), "events.jsonl")
        assert [event["checkpoint"] for event in events if event["event"] == "rolled_back"] == [0, 6]
    urls = [locate(folder(root, "poisoned").url) for root in (plain, copied)]
    assert list(differences(*urls)) == []


def test_copies_of_a_run_that_never_came_back_are_removed_after_a_day(tmp_path: Path) -> None:
    own, old, new, chosen = (LocalStorage(str(tmp_path / name)) for name in ("own", "old", "new", "chosen"))
    for storage in (own, old, new):
        node_room.mark(storage)
    for storage in (own, old, new, chosen):
        storage.write("step-00000002-attempt-0001/manifest.json", b"{}")
    yesterday = time.time() - node_room.STALE_S - 60
    for path in (own, old, chosen):
        os.utime(path.root, (yesterday, yesterday))
    for name in ("own", "old"):
        os.utime(tmp_path / f"{name}.automatic", (yesterday, yesterday))
    node_room.remove_stale(own)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chosen", "new", "new.automatic", "own", "own.automatic"
    ]  # fmt: skip


def test_what_is_free_is_also_a_question_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_room, "in_memory", lambda folder: True)
    monkeypatch.setattr(node_room, "memory_usage", lambda: Usage(used=9000, limit=10000))
    assert node_room.free_bytes(tmp_path) == 1000
    monkeypatch.setattr(node_room, "in_memory", lambda folder: False)
    assert node_room.free_bytes(tmp_path) > 1000
