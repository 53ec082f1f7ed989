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
from storage_suite import StorageSuite

from everstep.errors import StorageError
from everstep.storage import (
    FsspecStorage,
    LocalStorage,
    ObstoreStorage,
    Storage,
    gcs_credentials,
    join_url,
    open_storage,
)
from everstep.storage import obstore_backend as by_obstore
from support.processes import until


class TestLocal(StorageSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Storage:
        return LocalStorage(str(tmp_path / "root"))


class TestMemory(StorageSuite):
    # fsspec's memory store, which only tests use, has no lock between threads.
    test_of_many_creators_one_wins_and_its_bytes_stand = None

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
class TestGoogleByObstore(StorageSuite):
    @pytest.fixture
    def store(self, gcs: str) -> Storage:
        return ObstoreStorage(f"{gcs}/{uuid.uuid4().hex}")


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
        ("gs://bucket/runs", ObstoreStorage, "gs://bucket/runs"),
    ],
)
def test_a_url_opens_the_storage_that_it_names(url: str, kind: type, root: str) -> None:
    store = open_storage(url)
    assert isinstance(store, kind)
    assert store.url == root
    assert join_url(url, "a", "b").endswith("runs/a/b")


def test_a_protocol_that_nobody_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_SCHEMES", "nosuch")
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
    monkeypatch.setattr(os, "open", refuse)
    works: list[Callable[[], object]] = [
        lambda: store.read("file"), lambda: store.read_range("file", 0, 1), lambda: store.write("file", b"new"),
        lambda: store.create("new", b"x"), lambda: store.writer("file").__enter__(),
    ]  # fmt: skip
    for work in works:
        with pytest.raises(StorageError, match=f"cannot (read|write) {tmp_path}/.*{said}"):
            work()


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.mark.process
@pytest.mark.parametrize("verb", ["write", "create", "writer"])
@pytest.mark.parametrize("kind", [FsspecStorage, ObstoreStorage])
def test_a_bucket_that_is_not_there_is_one_line(bucket: str, kind: type[Storage], verb: str) -> None:
    url = f"{bucket.replace('bucket', 'nosuch')}/x"
    store = kind(url)  # type: ignore[call-arg]

    def work() -> None:
        if verb == "writer":
            with store.writer("file") as stream:
                stream.write(b"x" * 20_000_000)
        else:
            getattr(store, verb)("file", b"x")

    with pytest.raises(StorageError, match=f"cannot write {url}: there is no such bucket") as error:
        work()
    assert "\n" not in str(error.value)


@pytest.mark.process
def test_both_ways_to_a_store_find_each_others_files(bucket: str) -> None:
    url = f"{bucket}/{uuid.uuid4().hex}"
    one, other = FsspecStorage(url), ObstoreStorage(url)
    for name in ("a b/100%", "ä/x+y=z", "c"):
        one.write(f"one/{name}", b"x")
        other.write(f"other/{name}", b"x")
    assert one.names() == other.names() == ["one", "other"]
    for name in ("a b/100%", "ä/x+y=z", "c"):
        assert one.read(f"other/{name}") == other.read(f"one/{name}") == b"x"
    assert one.create("claim", b"1")
    assert not other.create("claim", b"2")
    assert other.create("another", b"2")
    assert not one.create("another", b"1")


@pytest.mark.process
def test_what_amazon_would_not_copy_by_itself_is_copied_in_parts(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_obstore, "COPY_LIMIT", 1000)
    store, data = ObstoreStorage(f"{s3}/{uuid.uuid4().hex}"), bytes(range(250)) * 80_000
    store.write("big", data)
    store.copy("big", "to/big")
    assert store.read("to/big") == data


def test_obstore_serves_what_it_knows_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        *gcs_credentials.TAKEN_FIRST,
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def by_obstore() -> list[str]:
        protocols = ("s3", "gs", "gcs", "az", "abfs", "memory")
        return [name for name in protocols if isinstance(open_storage(f"{name}://bucket/runs"), ObstoreStorage)]

    assert by_obstore() == ["gs", "gcs", "az", "abfs"]
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert by_obstore() == ["s3", "gs", "gcs", "az", "abfs"]
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://other")
    assert by_obstore() == ["gs", "gcs", "az", "abfs"]
    for name, value in (("FSSPEC_GCS_TOKEN", "anon"), ("FSSPEC_GS", '{"token": "anon"}')):
        with monkeypatch.context() as told:
            told.setenv(name, value)
            assert by_obstore() == ["az", "abfs"]
    with monkeypatch.context() as another:
        another.setenv("SERVICE_ACCOUNT", "trainer")
        assert by_obstore() == ["az", "abfs"]
    monkeypatch.setenv("EVERSTEP_OBSTORE", "0")
    assert by_obstore() == []
