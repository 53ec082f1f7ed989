"""Every storage keeps the same promises; what only one of them can get wrong is tested beside."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from process_helpers import until
from storage_suite import StorageSuite

from trainer.errors import StorageError
from trainer.storage import (
    FsspecStorage,
    LocalStorage,
    ObstoreStorage,
    Storage,
    join_url,
    open_storage,
    patience,
    retry,
)


class TestLocal(StorageSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Storage:
        return LocalStorage(str(tmp_path / "root"))


class TestMemory(StorageSuite):
    threads_race = False

    @pytest.fixture
    def store(self) -> Storage:
        return FsspecStorage(f"memory://{uuid.uuid4().hex}")


@pytest.mark.process
class TestS3(StorageSuite):
    @pytest.fixture
    def store(self, s3: str) -> Storage:
        return FsspecStorage(f"{s3}/{uuid.uuid4().hex}")


@pytest.mark.process
class TestS3ByObstore(StorageSuite):
    @pytest.fixture
    def store(self, s3: str) -> Storage:
        return ObstoreStorage(f"{s3}/{uuid.uuid4().hex}")


@pytest.mark.process
class TestGoogle(StorageSuite):
    @pytest.fixture
    def store(self, gcs: str) -> Storage:
        return FsspecStorage(f"{gcs}/{uuid.uuid4().hex}")


@pytest.mark.process
class TestAzure(StorageSuite):
    @pytest.fixture
    def store(self, azure: str) -> Storage:
        return FsspecStorage(f"{azure}/{uuid.uuid4().hex}")


@pytest.mark.process
class TestAzureByObstore(StorageSuite):
    @pytest.fixture
    def store(self, azure: str) -> Storage:
        return ObstoreStorage(f"{azure}/{uuid.uuid4().hex}")


@pytest.mark.parametrize(
    ("url", "kind", "root"),
    [
        ("runs", LocalStorage, str(Path("runs").absolute())),
        ("~/runs", LocalStorage, str(Path.home() / "runs")),
        ("file:///tmp/runs", LocalStorage, "/tmp/runs"),
        ("memory://runs/", FsspecStorage, "memory://runs"),
        ("s3://bucket/runs", FsspecStorage, "s3://bucket/runs"),
    ],
)
def test_a_url_opens_the_storage_that_it_names(url: str, kind: type, root: str) -> None:
    store = open_storage(url)
    assert isinstance(store, kind)
    assert store.url == root
    assert join_url(url, "a", "b").endswith("runs/a/b")


def test_a_protocol_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(StorageError, match="cannot open nosuch://bucket/runs: Protocol not known: nosuch"):
        open_storage("nosuch://bucket/runs").read("file")


# ---------------------------------------------------------------------------------------------------- local disks


def killed_while(work: Callable[[], None], ready: Callable[[], bool]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        until(ready)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("verb", ["write", "writer", "create"])
def test_a_kill_in_the_middle_of_a_local_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    store, name = LocalStorage(str(tmp_path)), "new" if verb == "create" else "file"
    store.write("file", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(60))  # in the child: the bytes are written, not published

    def work() -> None:
        if verb == "writer":
            with store.writer("file") as stream:
                stream.write(b"x" * 100_000)
        else:
            getattr(store, verb)(name, b"x" * 100_000)

    killed_while(work, lambda: any(f.stat().st_size == 100_000 for f in tmp_path.glob(".*.staged")))
    assert store.read("file") == b"old"
    assert store.names() == ["file"]


def test_local_writes_are_on_the_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, order = LocalStorage(str(tmp_path)), []
    for name in ("fsync", "replace", "link"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (order.append(n), f(*a))[1])
    store.write("a", b"x")
    store.create("b", b"x")
    with store.writer("c") as stream:
        stream.write(b"x")
    assert order == ["fsync", "replace", "fsync", "fsync", "link", "fsync", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("verb", ["write", "create", "writer"])
def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path, verb: str) -> None:
    (tmp_path / "taken").write_text("")
    store = LocalStorage(str(tmp_path))
    for path in ("taken/file", "taken/deep/file"):
        work = store.writer(path).__enter__ if verb == "writer" else partial(getattr(store, verb), path, b"x")
        with pytest.raises(StorageError, match="cannot write") as error:
            work()
        assert str(tmp_path / "taken") in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("number", "said"), [(13, "Permission denied"), (28, "No space left on device")])
def test_what_the_disk_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    store = LocalStorage(str(tmp_path))
    store.write("file", b"old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    works: list[Callable[[], object]] = [
        lambda: store.read("file"), lambda: store.read_range("file", 0, 1), lambda: store.write("file", b"new"),
        lambda: store.create("new", b"x"), lambda: store.writer("file").__enter__(),
    ]  # fmt: skip
    for work in works:
        with pytest.raises(StorageError, match=f"cannot (read|write) {tmp_path}/.*{said}"):
            work()


# ---------------------------------------------------------------------------------------------------- other stores


class Flaky:
    """A store whose every verb fails `faults` times before it works."""

    def __init__(self, faults: int, fault: Exception) -> None:
        self.left, self.fault, self.calls = faults, fault, 0
        self.files: dict[str, bytes] = {}

    def _maybe(self) -> None:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.fault

    def cat_file(self, path: str, **_: int) -> bytes:
        self._maybe()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and path in self.files:
            raise FileExistsError(path)
        self.files[path] = data  # the bytes arrive even when the answer gets lost
        self._maybe()

    def invalidate_cache(self) -> None: ...


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.0)


def flaky(faults: int, fault: Exception) -> tuple[FsspecStorage, Flaky]:
    store, fs = FsspecStorage("s3://bucket/x"), Flaky(faults, fault)
    store._opened = (os.getpid(), fs, "bucket/x")
    return store, fs


@pytest.mark.parametrize("fault", [OSError(5, "reset"), ConnectionError("gone"), TimeoutError("slow")])
def test_a_fault_that_passes_is_tried_again(fault: Exception) -> None:
    store, fs = flaky(module.ATTEMPTS - 1, fault)
    fs.files["bucket/x/file"] = b"data"
    assert store.read("file") == b"data"
    assert fs.calls == module.ATTEMPTS


def test_a_fault_that_stays_is_one_line() -> None:
    store, fs = flaky(99, OSError("the store is down"))
    with pytest.raises(StorageError, match=r"s3://bucket/x: gave up after 6 tries: the store is down"):
        store.read("file")
    assert fs.calls == module.ATTEMPTS


def test_a_creator_whose_answer_got_lost_has_won_all_the_same() -> None:
    store, _ = flaky(1, ConnectionError("gone"))
    assert store.create("claim", b"mine")
    assert not store.create("claim", b"another's")


def test_permission_denied_is_one_line_at_once() -> None:
    store, fs = flaky(99, PermissionError("Access Denied"))
    with pytest.raises(StorageError, match=r"s3://bucket/x: permission denied \(Access Denied\)"):
        store.read("file")
    assert fs.calls == 1


def test_what_is_missing_is_not_tried_again() -> None:
    store, fs = flaky(0, OSError())
    with pytest.raises(FileNotFoundError):
        store.read("file")
    assert fs.calls == 1


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        retry(lambda: {}["x"], "s3://bucket")


@pytest.mark.process
def test_a_fork_opens_a_client_of_its_own(s3: str) -> None:
    store = FsspecStorage(f"{s3}/{uuid.uuid4().hex}")
    store.write("file", b"data")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if store.read("file") == b"data" else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked client hangs")
        time.sleep(0.01)
    assert done[1] == 0


@pytest.mark.process
@pytest.mark.parametrize("verb", ["write", "create"])
def test_a_bucket_that_is_not_there_is_one_line(s3: str, verb: str) -> None:
    with pytest.raises(StorageError, match="there is no such bucket"):
        getattr(FsspecStorage("s3://nosuch/x"), verb)("file", b"x")
