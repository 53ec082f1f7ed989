"""A run whose store fails, stalls, lies or goes away: it goes on or ends in one line, and what was saved stays."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint import checkpointer
from everstep.trainer.checkpoint.manifest import candidates, was_set_aside
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_lines
from support.fault_proxy import Proxy, fault_proxy
from support.processes import until
from support.ranks import folder, ledger, train
from support.saved_checkpoint import newest_step
from support.small_disks import small_disk

pytestmark = pytest.mark.dist
KEEP = ("checkpoint.keep_last=9", "checkpoint.keep_best=0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert train(2, root, *KEEP).codes == [0, 0]
    return root


@pytest.fixture(scope="module")
def shared(s3_server: str) -> Iterator[Proxy]:
    with fault_proxy(int(s3_server.rsplit(":", 1)[1])) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3: str, shared: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the run and its store. Whoever waits, waits for a little while only."""
    shared.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared.url)
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "3")
    monkeypatch.setattr(checkpointer, "RETRY_S", 0.05)
    yield shared
    shared.clear()


@pytest.fixture
def root() -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


def run_of(root: str) -> RunFolder:
    return RunFolder(f"{root}/toy")


def assert_same(notes: Path, url: str, undisturbed: Path) -> None:
    assert ledger(notes) == ledger(undisturbed)
    assert list(differences(locate(url), locate(folder(undisturbed).url))) == []


def events(run: RunFolder, kind: str) -> list[dict[str, object]]:
    return [event for event in read_lines(run, "events.jsonl") if event["event"] == kind]


PASSING: dict[str, Callable[[Proxy], None]] = {
    "answers that the store is busy": lambda p: p.fail(503, times=4, method="PUT", path="step-00000004"),
    "connections that break in the middle of a part": lambda p: p.reset_up(500, 3, "PUT", ".tensors"),
    "answers of a commit that get lost": lambda p: p.lose(times=2, method="PUT", path="manifest.json"),
    "answers that come late": lambda p: p.slow(0.5, times=6, path="step-0000000"),
    "a list that is old": lambda p: p.stale(times=2, path="checkpoints"),
    "failures of everything, now and then": lambda p: [p.fail(500, 1, m) for m in ("PUT", "GET", "PUT", "HEAD")],  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", PASSING)
def test_what_passes_is_outlived(proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path, what: str) -> None:
    PASSING[what](proxy)
    ended = train(2, tmp_path, f"run_root={root}", *KEEP)
    assert ended.codes == [0, 0], ended.printed
    assert [request for request in proxy.requests if request.fault]
    assert_same(tmp_path, run_of(root).url, undisturbed)
    assert [c.step for c in candidates(run_of(root))] == [12, 8, 4]


def test_a_slow_line_is_waited_for(proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path) -> None:
    proxy.rate = proxy.rate_up = 1e5
    ended = train(2, tmp_path, f"run_root={root}", *KEEP)
    assert ended.codes == [0, 0], ended.printed
    proxy.clear()
    assert_same(tmp_path, run_of(root).url, undisturbed)


def test_a_save_in_an_outage_fails_and_is_made_up_for(
    proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path
) -> None:
    """The outage outlasts the patience of a verb: training goes on, and the state is saved when the store is back."""
    proxy.fail(503, times=10_000, method="PUT", path="step-00000004")

    def slow(rank: int) -> None:
        from everstep.trainer.step import Stepper

        original = Stepper.__call__

        def paced(self: Stepper, batches: object) -> None:
            if self.state.progress.step in (5, 6, 7):
                time.sleep(1.6)  # steps of a larger model
            original(self, batches)  # type: ignore[arg-type]

        Stepper.__call__ = paced  # type: ignore[method-assign]

    ended = train(2, tmp_path, f"run_root={root}", *KEEP, before=slow)
    assert ended.codes == [0, 0], ended.printed
    assert [event["step"] for event in events(run_of(root), "save_failed")] == [4]
    steps = [c.step for c in candidates(run_of(root))]
    assert steps[0] == 12
    assert 4 not in steps
    assert min(steps) in (6, 7, 8)
    assert_same(tmp_path, run_of(root).url, undisturbed)


@pytest.mark.parametrize(("status", "said"), [(403, "denied"), (404, "bucket")])
def test_a_store_that_takes_nothing_any_more_ends_the_run_and_keeps_the_newest(
    proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path, status: int, said: str
) -> None:
    proxy.fail(status, times=10_000, method="PUT", path="step-00000008")
    proxy.fail(status, times=10_000, method="PUT", path="step-00000009")
    for step in (10, 11, 12):
        proxy.fail(status, times=10_000, method="PUT", path=f"step-000000{step}")
    ended = train(2, tmp_path, f"run_root={root}", *KEEP, "checkpoint.max_failures=2")
    assert ended.codes == [2, 2], ended.printed
    assert ended.printed.count("error:") == 1
    assert "2 saves in a row have failed" in ended.printed
    assert said in ended.printed
    assert "checkpoint.max_failures=2" in ended.printed
    assert "Traceback" not in ended.printed
    assert newest_step(run_of(root)) == 4
    proxy.clear()
    assert train(2, tmp_path, f"run_root={root}", *KEEP).codes == [0, 0]
    assert_same(tmp_path, run_of(root).url, undisturbed)


def test_a_byte_that_changes_on_its_way_is_read_again_and_damages_nothing(
    proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path
) -> None:
    train(2, tmp_path, f"run_root={root}", *KEEP, "steps=8")
    proxy.corrupt(at=40, times=1, method="GET", path="rank-0001.tensors")
    ended = train(2, tmp_path, f"run_root={root}", *KEEP)
    assert ended.codes == [0, 0], ended.printed
    assert [r.fault for r in proxy.requests if r.fault] == ["corrupt"]
    assert was_set_aside(run_of(root)) == []
    assert_same(tmp_path, run_of(root).url, undisturbed)


@pytest.mark.parametrize("name", ["rank-0000.tensors", "rank-0001.tensors", "tensors.json", "manifest.json"])
def test_a_flipped_bit_in_a_file_of_the_store_sends_the_run_back(
    proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path, name: str
) -> None:
    train(2, tmp_path, f"run_root={root}", *KEEP, "steps=8")
    storage, path = run_of(root).storage, f"checkpoints/step-00000008-attempt-0001/{name}"
    data = bytearray(storage.read(path))
    data[len(data) // 2] ^= 8
    storage.write(path, bytes(data))
    ended = train(2, tmp_path, f"run_root={root}", *KEEP)
    assert ended.codes == [0, 0], ended.printed
    assert_same(tmp_path, run_of(root).url, undisturbed)


def test_a_writer_that_was_cut_off_in_its_upload_commits_nothing_that_counts(
    proxy: Proxy, s3_server: str, root: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network comes back when its successor is done: what it then writes is part of no run."""
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "90")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    first = os.fork()
    if first == 0:
        proxy.hang(times=1, method="PUT", path="step-00000008")
        os._exit(train(1, old, f"run_root={root}", *KEEP).codes[0])
    try:
        deadline = time.monotonic() + 60
        while not any(request.fault == "hang" for request in proxy.requests):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        proxy.black_hole = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
        assert train(1, new, f"run_root={root}", *KEEP).codes == [0]
        there = [(c.step, c.attempt) for c in candidates(run_of(root))]
        assert there == [(12, 2), (8, 2), (4, 1)]
        proxy.black_hole = False
        _, status = os.waitpid(first, 0)
    except BaseException:
        os.kill(first, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == Outcome.superseded.exit_code
    assert [(c.step, c.attempt) for c in candidates(run_of(root))] == there
    assert list(differences(locate(run_of(root).url), locate(run_of(root).url))) == []


# ------------------------------------------------------------------------------------------------ on a disk


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as place:
        yield place


def fill_at(step: int, place: Path) -> Callable[[int], None]:
    """A trap: rank 0 fills the disk as a step begins, once the save before it has come to its end."""

    def lay(rank: int) -> None:
        from everstep.trainer.step import Stepper

        original = Stepper.__call__

        def filling(self: Stepper, batches: object) -> None:
            if rank == 0 and self.state.progress.step + 1 == step:
                until(lambda: any(place.glob("toy/checkpoints/*/manifest.json")), 60)
                with (place / "filler").open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass
            original(self, batches)  # type: ignore[arg-type]

        Stepper.__call__ = filling  # type: ignore[method-assign]

    return lay


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "RETRY_S", 0.05)


@pytest.mark.usefixtures("hasty")
def test_a_disk_that_is_full_for_a_while_costs_saves_but_no_step(
    undisturbed: Path, tmp_path: Path, little_disk: Path
) -> None:
    def make_room() -> None:
        deadline = time.monotonic() + 60
        lines = little_disk / "toy/attempts/0001/rank-0000.log"
        while time.monotonic() < deadline and not (lines.exists() and "save_failed" in lines.read_text()):
            time.sleep(0.01)
        (little_disk / "filler").unlink(missing_ok=True)

    waiting = threading.Thread(target=make_room)
    ended = train(
        2, tmp_path, f"run_root={little_disk}", *KEEP, "checkpoint.max_failures=8", before=fill_at(7, little_disk),
        meanwhile=lambda _: waiting.start(),
    )  # fmt: skip
    waiting.join()
    assert ended.codes == [0, 0], ended.printed
    assert newest_step(folder(little_disk)) == 12
    assert_same(tmp_path, folder(little_disk).url, undisturbed)


@pytest.mark.usefixtures("hasty")
def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_keeps_the_newest(
    undisturbed: Path, tmp_path: Path, little_disk: Path
) -> None:
    ended = train(
        2, tmp_path, f"run_root={little_disk}", *KEEP, "checkpoint.max_failures=2", before=fill_at(7, little_disk)
    )
    assert ended.codes == [2, 2], ended.printed
    assert "No space left on device" in ended.printed
    assert "Traceback" not in ended.printed
    assert newest_step(folder(little_disk)) == 4
    (little_disk / "filler").unlink()
    assert train(2, tmp_path, f"run_root={little_disk}", *KEEP).codes == [0, 0]
    assert_same(tmp_path, folder(little_disk).url, undisturbed)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off_changes_nothing(undisturbed: Path, tmp_path: Path, hours: int) -> None:
    def shift(rank: int) -> None:
        true = time.time
        time.time = lambda: true() + 3600 * hours

    train(2, tmp_path, *KEEP, "steps=8")
    assert train(2, tmp_path, *KEEP, before=shift).codes == [0, 0]
    assert_same(tmp_path, folder(tmp_path).url, undisturbed)


def test_with_busy_skip_a_slow_store_costs_checkpoints_and_no_time(
    proxy: Proxy, root: str, undisturbed: Path, tmp_path: Path
) -> None:
    proxy.slow(1.5, times=1, method="PUT", path="step-00000004")
    ended = train(2, tmp_path, f"run_root={root}", *KEEP, "checkpoint.busy=skip", "checkpoint.every=2")
    assert ended.codes == [0, 0], ended.printed
    assert events(run_of(root), "save_skipped")
    assert newest_step(run_of(root)) == 12
    assert_same(tmp_path, run_of(root).url, undisturbed)
