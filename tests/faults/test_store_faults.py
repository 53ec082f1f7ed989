"""Whatever a store does, a verb ends with the right bytes or in one clear line, and never leaves half a file."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from everstep.errors import StorageError
from everstep.run_folder import RunFolder
from everstep.storage import LocalStorage, Storage, fsspec_backend, open_storage, retries
from everstep.storage import obstore_library as obstore_clients
from support.fault_proxy import Proxy
from support.processes import until
from support.small_disks import small_disk
from support.store_clients import Way

pytestmark = pytest.mark.process
SMALL, BIG = bytes(range(256)) * 40, bytes(range(250)) * 160_000
"""10 kB in one request, 40 MB in three parts."""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of two seconds in place of a quarter of a minute; the server needs one for a part on a busy machine."""
    for module in (fsspec_backend, obstore_clients):
        monkeypatch.setattr(module, "QUIET_S", 2.0)
        monkeypatch.setattr(module, "CONNECT_S", 1.0)
        monkeypatch.setattr(module, "SEND_S", 6.0)
    monkeypatch.setattr(fsspec_backend, "QUICK_S", 4.0)


def stream(store: Storage, path: str, data: bytes) -> None:
    with store.writer(path) as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])


WORKS: dict[str, Callable[[Storage], object]] = {
    "write": lambda store: store.write("new", SMALL),
    "write much": lambda store: store.write("new", BIG),
    "create": lambda store: store.create("new", SMALL) or pytest.fail("somebody else has created it"),
    "stream": lambda store: stream(store, "new", SMALL),
    "stream much": lambda store: stream(store, "new", BIG),
    "copy": lambda store: store.copy("old", "new"),
}
LOOKS: dict[str, Callable[[Storage], object]] = {
    "read": lambda store: store.read("old") == SMALL,
    "range": lambda store: store.read_range("old", 10, 20) == SMALL[10:20],
    "size": lambda store: store.size("old") == len(SMALL),
    "exists": lambda store: store.exists("old") and not store.exists("other"),
    "names": lambda store: store.names() == ["old"],
}


def is_right(store: Storage, work: str) -> bool:
    return store.read("new") == (BIG if "much" in work else SMALL)


@pytest.mark.parametrize("work", WORKS)
def test_a_burst_of_errors_is_outlived_by_what_writes(proxy: Proxy, store: Storage, work: str) -> None:
    store.write("old", SMALL)
    proxy.fail(status=503, times=2)
    proxy.fail(status=500)
    WORKS[work](store)
    assert [request.fault for request in proxy.requests].count("fail") == 3
    assert is_right(store, work)


@pytest.mark.parametrize("look", LOOKS)
def test_a_burst_of_errors_is_outlived_by_what_reads(proxy: Proxy, store: Storage, look: str) -> None:
    store.write("old", SMALL)
    proxy.fail(status=503, times=3)
    assert LOOKS[look](store)
    proxy.reset(times=2, method="GET")
    assert LOOKS[look](store)


def test_delete_and_move_outlive_a_burst_of_errors(proxy: Proxy, store: Storage) -> None:
    store.write("folder/old", SMALL)
    proxy.fail(times=2)
    store.move("folder", "to")
    proxy.fail(times=2)
    store.delete("nowhere")
    assert store.names() == ["to"]
    assert store.read("to/old") == SMALL


def test_a_delete_whose_answer_is_lost_removes_all(proxy: Proxy, store: Storage, way: Way) -> None:
    for number in range(5):
        store.write(f"folder/{number}", SMALL)
    proxy.lose(method="DELETE" if way.protocol == "gs" else "POST")
    store.delete("folder")
    assert [request.fault for request in proxy.requests].count("lose") == 1
    assert store.names() == []


def test_a_delete_that_meets_another_removes_what_is_left(proxy: Proxy, store: Storage) -> None:
    for number in range(5):
        store.write(f"folder/{number}", SMALL)
    assert store.exists("folder")
    store.delete("folder/2")
    proxy.stale(times=1, path="folder")  # it was listed before the other delete
    store.delete("folder")
    assert [request.fault for request in proxy.requests].count("stale") == 1
    assert store.names() == []


def test_connections_that_break_in_the_middle_of_a_part_are_made_up_for(proxy: Proxy, store: Storage) -> None:
    store.write("new", SMALL)
    proxy.reset_up(after=3_000_000, times=2, method="PUT", path="partNumber=2")
    proxy.reset_up(after=100_000, method="PUT", path="partNumber=1")
    stream(store, "new", BIG)
    assert [request.fault for request in proxy.requests].count("reset_up") == 3
    assert store.read("new") == BIG


def test_an_answer_that_breaks_in_the_middle_is_asked_for_again(proxy: Proxy, store: Storage) -> None:
    store.write("big", BIG)
    proxy.reset(after=5_000_000, times=2, method="GET")
    assert store.read("big") == BIG
    proxy.reset(after=1000, method="GET")
    assert store.read_range("big", 5000, 105_000) == BIG[5000:105_000]


@pytest.mark.parametrize("work", ["write", "create", "stream"])
def test_an_answer_that_is_lost_changes_nothing(proxy: Proxy, store: Storage, work: str) -> None:
    proxy.lose(method="PUT")
    WORKS[work](store)
    assert is_right(store, work)
    assert not store.create("new", b"another's")


@pytest.mark.parametrize("work", ["write much", "stream much"])
def test_an_answer_that_is_lost_at_the_end_of_an_upload_changes_nothing(
    proxy: Proxy, store: Storage, way: Way, work: str
) -> None:
    store.write("new", b"old")
    proxy.lose(method="POST", path="uploadId")
    WORKS[work](store)
    in_one = work == "write much" and way.name == "s3 by s3fs"
    assert [request.fault for request in proxy.requests].count("lose") == (0 if in_one else 1)
    assert is_right(store, work)


def test_a_stream_whose_upload_somebody_else_breaks_off_is_one_line(
    proxy: Proxy, store: Storage, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "1")  # moto answers with a fault of its own, which may pass

    def break_off() -> None:
        until(lambda: any("uploadId=" in request.path for request in proxy.requests))
        path = next(request.path for request in proxy.requests if "uploadId=" in request.path)
        ask(way, proxy, "DELETE", re.sub("partNumber=[0-9]*&|&partNumber=[0-9]*", "", path)[1:])

    def write(file: IO[bytes]) -> None:
        file.write(BIG[:20_000_000])
        break_off()
        file.write(BIG[20_000_000:])

    store.write("old", SMALL)
    for name in ("old", "new"):
        proxy.clear()
        with pytest.raises(StorageError, match=f"{store.url}: ") as error, store.writer(name) as file:
            write(file)
        assert "\n" not in str(error.value)
        assert "no such bucket" not in str(error.value)
    assert store.names() == ["old"]
    assert store.read("old") == SMALL


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("work", ["write", "create", "stream much"])
def test_a_request_that_hangs_is_given_up_and_made_again(proxy: Proxy, store: Storage, work: str) -> None:
    store.write("old", SMALL)
    proxy.hang(method="PUT")
    WORKS[work](store)
    assert is_right(store, work)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("work", ["write", "create", "stream much"])
def test_an_outage_that_ends_is_outlived(proxy: Proxy, store: Storage, work: str) -> None:
    proxy.black_hole = True
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(WORKS[work], store)
        until(lambda: proxy.swallowed >= 2, 60)
        assert not working.done()
        proxy.black_hole = False
        working.result(60)
    assert is_right(store, work)


@pytest.mark.usefixtures("impatient")
def test_an_outage_in_the_middle_of_a_stream_is_outlived(proxy: Proxy, store: Storage) -> None:
    with store.writer("new") as file:
        file.write(BIG[:20_000_000])
        until(lambda: any("partNumber" in request.path for request in proxy.requests))
        proxy.black_hole = True
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(file.write, BIG[20_000_000:])
            until(lambda: proxy.swallowed >= 1, 60)
            proxy.black_hole = False
            working.result(60)
    assert store.read("new") == BIG


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("work", ["write much", "create", "stream much", "copy", "read", "range", "names"])
def test_an_outage_that_does_not_end_is_one_line(
    proxy: Proxy, store: Storage, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("old", SMALL)
    proxy.black_hole = True
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "1")
    with pytest.raises(StorageError, match=rf"{store.url}") as error:
        (WORKS | LOOKS)[work](open_storage(store.url))
    assert "\n" not in str(error.value)
    proxy.black_hole = False
    monkeypatch.delenv("EVERSTEP_STORAGE_DEADLINE_S")
    assert store.names() == ["old"]


@pytest.mark.parametrize("work", ["create", "stream"])
def test_a_line_of_a_megabyte_a_second_is_waited_for(proxy: Proxy, store: Storage, work: str) -> None:
    proxy.rate_up = proxy.rate = 1e6
    data = BIG[:1_500_000]
    {"write": store.write, "create": store.create}.get(work, lambda *_: stream(store, "new", data))("new", data)
    assert store.read("new") == data


def test_a_list_of_yesterday_gives_no_two_starts_the_same_number(proxy: Proxy, store: Storage) -> None:
    first = RunFolder(store.url)
    assert first.attempts() == []
    assert first.claim({}) == 1
    proxy.clear()
    assert RunFolder(store.url).attempts() == [1]
    assert RunFolder(store.url).claim({}) == 2
    proxy.stale(times=1, path="attempts")
    late = RunFolder(store.url)
    assert late.claim({}) == 3
    assert [request.fault for request in proxy.requests].count("stale") == 1
    assert late.attempts() == [1, 2, 3]


@pytest.mark.parametrize("work", [*WORKS, "delete"])
def test_a_store_that_may_only_be_read_is_one_line_at_once(proxy: Proxy, store: Storage, work: str) -> None:
    store.write("old", SMALL)
    for method in ("PUT", "POST", "DELETE"):
        proxy.fail(status=403, times=100, method=method)
    done = len(proxy.requests)
    with pytest.raises(StorageError, match=rf"{store.url}: permission denied \(.*\)$") as error:
        {**WORKS, "delete": lambda store: store.delete("old")}[work](store)
    assert "\n" not in str(error.value)
    assert len([request for request in proxy.requests[done:] if request.fault]) == 1
    assert store.names() == ["old"]


@pytest.mark.parametrize("work", [*WORKS, *LOOKS])
def test_a_bucket_that_disappears_is_one_line(proxy: Proxy, way: Way, work: str) -> None:
    bucket = f"b{uuid.uuid4().hex}"
    ask(way, proxy, "PUT", bucket)
    store = open_storage(f"{way.protocol}://{bucket}/run")
    store.write("old", SMALL)
    store.delete("old")
    ask(way, proxy, "DELETE", bucket)
    if work in ("names", "exists"):  # as in a folder where nothing is
        assert store.names() == []
        assert not store.exists("old")
        return
    with pytest.raises((StorageError, FileNotFoundError)) as error:
        (WORKS | LOOKS)[work](store)
    assert "\n" not in str(error.value) or isinstance(error.value, FileNotFoundError)
    assert isinstance(error.value, FileNotFoundError) == (work in ("read", "range", "size", "copy"))


def ask(way: Way, proxy: Proxy, method: str, path: str) -> str:
    """Of the server itself: to make a bucket, to remove it, to read a path; Google's makes them by JSON."""
    signed = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    asked = urllib.request.Request(f"{proxy.url}/{path}", method=method, headers={"Authorization": signed})
    if way.protocol == "gs" and method != "GET" and "?" not in path:
        made = json.dumps({"name": path}).encode() if method == "PUT" else None
        at = "/storage/v1/b?project=test" if made else f"/storage/v1/b/{path}"
        fields = {"Content-Type": "application/json"}
        asked = urllib.request.Request(proxy.url + at, made, fields, method="POST" if made else method)
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return str(answer.read())


def test_of_a_stream_whose_writer_is_killed_nothing_appears(proxy: Proxy, store: Storage) -> None:
    store.write("new", b"old")
    pid = os.fork()
    if pid == 0:
        try:
            with store.writer("new") as file:
                file.write(BIG[:34_000_000])
                threading.Event().wait(60)
        finally:
            os._exit(0)
    try:
        until(lambda: sum("partNumber" in request.path for request in proxy.requests) >= 2, 60)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert store.read("new") == b"old"
    assert store.names() == ["new"]


def test_a_stream_that_fails_leaves_no_parts_in_the_store(proxy: Proxy, store: Storage, way: Way) -> None:
    def write_and_fail(file: IO[bytes]) -> None:
        file.write(BIG[:34_000_000])
        until(lambda: any("partNumber" in request.path for request in proxy.requests))
        raise KeyError

    with pytest.raises(KeyError), store.writer("new") as file:
        write_and_fail(file)
    assert store.url.rsplit("/", 1)[1] not in ask(way, proxy, "GET", "bucket?uploads")


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m") as place:
        yield place


@pytest.mark.parametrize("work", ["write", "create", "stream"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(little_disk: Path, work: str) -> None:
    store = LocalStorage(str(little_disk / "run"))
    store.write("old", SMALL)
    works: dict[str, Callable[[], object]] = {
        "write": lambda: store.write("old", BIG), "create": lambda: store.create("new", BIG),
        "stream": lambda: stream(store, "old", BIG),
    }  # fmt: skip
    with pytest.raises(StorageError, match=rf"cannot write {little_disk}/run/\w+: No space left on device") as error:
        works[work]()
    assert "\n" not in str(error.value)
    assert store.read("old") == SMALL
    assert [path.name for path in (little_disk / "run").iterdir()] == ["old"]
    store.write("new", SMALL)
