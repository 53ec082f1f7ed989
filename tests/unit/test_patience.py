"""What is tried again and what is not, how long, and what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from everstep.errors import StorageError
from everstep.storage import FsspecStorage, retries, retry


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


class Refusing(Exception):
    """As a client of some store would raise it."""

    def __init__(self, text: str = "", status: int = 0) -> None:
        super().__init__(text)
        self.status = status


Refusing.__module__ = "some.client"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time stands still but for the waits, which are these."""
    waited: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    monkeypatch.setattr(retries.time, "monotonic", lambda: sum(waited))
    return waited


def flaky(faults: int, fault: Exception) -> tuple[FsspecStorage, Flaky]:
    store, fs = FsspecStorage("s3://bucket/x"), Flaky(faults, fault)
    store._opened = (os.getpid(), fs, "bucket/x")
    return store, fs


@pytest.mark.parametrize(
    "fault",
    [
        OSError(5, "reset"), ConnectionError("gone"), TimeoutError("slow"), Refusing("", 503), Refusing("", 429),
        Refusing("Server returned non-2xx status code: 500 Internal"), Refusing("<Code>RequestTimeout</Code>", 400),
    ],
)  # fmt: skip
def test_a_fault_that_passes_is_tried_again(waits: list[float], fault: Exception) -> None:
    store, fs = flaky(5, fault)
    fs.files["bucket/x/file"] = b"data"
    assert store.read("file") == b"data"
    assert fs.calls == 6


def test_a_fault_that_stays_is_one_line_after_the_deadline(waits: list[float]) -> None:
    store, _ = flaky(10**6, OSError("the store is down"))
    with pytest.raises(StorageError, match=r"s3://bucket/x: gave up after \d+ s, \d+ tries: the store is down"):
        store.read("file")
    assert retries.DEADLINE_S - retries.LONGEST_DELAY_S < sum(waits) <= retries.DEADLINE_S


def test_waits_are_drawn_from_a_range_that_doubles_up_to_a_limit(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(retries._JITTER, "uniform", lambda low, high: (drawn.append((low, high)), high)[1])
    with pytest.raises(StorageError):
        flaky(10**6, OSError("down"))[0].read("file")
    assert drawn[:7] == [(0, 0.2), (0, 0.4), (0, 0.8), (0, 1.6), (0, 3.2), (0, 6.4), (0, 10.0)]
    assert set(drawn[6:]) == {(0, 10.0)}


def test_the_deadline_can_be_said_in_the_environment(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.DEADLINE, "1.5")
    with pytest.raises(StorageError, match="gave up"):
        flaky(10**6, OSError("down"))[0].read("file")
    assert sum(waits) <= 1.5
    monkeypatch.setenv(retries.DEADLINE, "soon")
    with pytest.raises(StorageError, match="EVERSTEP_STORAGE_DEADLINE_S=soon is not a number of seconds"):
        flaky(10**6, OSError("down"))[0].read("file")


def test_a_creator_whose_answer_got_lost_has_won_all_the_same(waits: list[float]) -> None:
    store, _ = flaky(1, ConnectionError("gone"))
    assert store.create("claim", b"mine")
    assert not store.create("claim", b"another's")


def test_a_conflict_over_a_file_that_is_not_there_is_tried_again(waits: list[float]) -> None:
    store, fs = flaky(0, OSError())
    refusals = iter([True, True, False])
    put = fs.pipe_file

    def pipe_file(path: str, data: bytes, mode: str) -> None:
        if next(refusals):
            raise FileExistsError(path)
        put(path, data, mode)

    fs.pipe_file = pipe_file  # type: ignore[method-assign]
    assert store.create("claim", b"mine")
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (PermissionError("Access Denied"), r"permission denied \(Access Denied\)"),
        (Refusing("no", 403), r"permission denied \(no\)"),
        (Refusing("Server returned non-2xx status code: 401 Unauthorized"), "permission denied"),
        (OSError(28, "No space left on device"), "the store refuses: .*No space left"),
        (OSError(30, "Read-only file system"), "the store refuses: .*Read-only"),
        (Refusing("bad", 400), "the store refuses: bad"),
    ],
)
def test_what_will_not_change_is_one_line_at_once(waits: list[float], fault: Exception, said: str) -> None:
    store, fs = flaky(99, fault)
    with pytest.raises(StorageError, match=rf"s3://bucket/x: {said}"):
        store.read("file")
    assert fs.calls == 1
    assert waits == []


@pytest.mark.parametrize("fault", [FileNotFoundError("file"), Refusing("", 404)])
def test_what_is_missing_is_not_tried_again(waits: list[float], fault: Exception) -> None:
    store, fs = flaky(1, fault)
    with pytest.raises(FileNotFoundError):
        store.read("file")
    assert fs.calls == 1


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        retry(lambda: {}["x"], "s3://bucket")


def test_an_error_is_said_in_one_line_without_signed_queries_and_debug_texts() -> None:
    error = Refusing("GET http://host/x?sig=SECRET&se=1 failed\n<Error>\n</Error>\n\nDebug source:\nStuff { .. }")
    assert retries.reason(error) == "GET http://host/x failed <Error> </Error>"
    assert retries.reason(Refusing("x <Code>NoSuchKey</Code><Message>None here</Message>")) == "NoSuchKey: None here"
    assert len(retries.reason(Refusing("x" * 5000))) < 400


def test_the_package_imports_no_client_before_it_is_asked_to() -> None:
    code = (
        "import sys, everstep.storage as s; s.open_storage('s3://b/x'); s.open_storage('az://b/x');"
        "print(sorted({'fsspec','s3fs','obstore','botocore','aiohttp','torch'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
