"""What the proxy is told to do it does, to a client that retries nothing; other tests rely on that."""

from __future__ import annotations

import http.client
import time
import uuid
from collections.abc import Iterator

import pytest

from support.fault_proxy import Proxy, fault_proxy

pytestmark = pytest.mark.process

SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""The server of the tests wants to know who asks, and believes anything."""
BODY = bytes(range(256)) * 2000


@pytest.fixture(scope="module")
def shared(s3_server: str) -> Iterator[Proxy]:
    with fault_proxy(int(s3_server.rsplit(":", 1)[1])) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared: Proxy) -> Proxy:
    shared.clear()
    return shared


@pytest.fixture
def path(proxy: Proxy) -> str:
    """Of an object in the store."""
    path = f"/bucket/{uuid.uuid4().hex}"
    assert ask(proxy, "PUT", path, BODY) == (200, b"")
    proxy.clear()
    return path


def ask(proxy: Proxy, method: str, path: str, body: bytes | None = None, **fields: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=2)
    try:
        connection.request(method, path, body, {"Authorization": SIGNED, **fields})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_faults_everything_passes_and_is_counted(proxy: Proxy, path: str) -> None:
    assert ask(proxy, "GET", path) == (200, BODY)
    assert ask(proxy, "GET", path, Range="bytes=10-19") == (206, BODY[10:20])
    assert ask(proxy, "HEAD", path) == (200, b"")
    assert ask(proxy, "GET", f"{path}-none")[0] == 404
    seen = [(request.method, request.path, request.range, request.fault) for request in proxy.requests]
    assert seen == [
        ("GET", path, "", ""),
        ("GET", path, "bytes=10-19", ""),
        ("HEAD", path, "", ""),
        ("GET", f"{path}-none", "", ""),
    ]


def test_faults_hit_as_many_requests_as_were_said_of_their_method_and_path(proxy: Proxy, path: str) -> None:
    proxy.fail(status=500, method="DELETE")
    proxy.fail(status=503, times=2, method="GET", path=path)
    assert [ask(proxy, "GET", path)[0] for _ in range(3)] == [503, 503, 200]
    assert ask(proxy, "DELETE", path)[0] == 500


def test_answers_are_cut_changed_and_broken_off(proxy: Proxy, path: str) -> None:
    proxy.truncate(keep=1000)
    assert ask(proxy, "GET", path) == (200, BODY[:1000])
    proxy.corrupt(at=200_000)
    changed = ask(proxy, "GET", path)[1]
    assert [at for at in range(len(BODY)) if changed[at] != BODY[at]] == [200_000]
    proxy.reset(after=300_000)
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        ask(proxy, "GET", path)
    assert ask(proxy, "GET", path) == (200, BODY)


def test_an_upload_that_is_broken_off_does_not_reach_the_store(proxy: Proxy, path: str) -> None:
    proxy.reset_up(after=100_000)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(proxy, "PUT", f"{path}-new", BODY)
    assert ask(proxy, "GET", f"{path}-new")[0] == 404


def test_requests_wait_and_are_never_answered(proxy: Proxy, path: str) -> None:
    proxy.hang()
    with pytest.raises(TimeoutError):
        ask(proxy, "GET", path)
    for setting, least in ({"delay_s": 0.3}, 0.3), ({"rate": 1e6}, 0.5):
        for name, value in setting.items():
            setattr(proxy, name, value)
        began = time.monotonic()
        assert ask(proxy, "GET", path) == (200, BODY)
        assert time.monotonic() - began > least * 0.9
        proxy.clear()


def test_uploads_pass_as_fast_as_was_said(proxy: Proxy, path: str) -> None:
    proxy.rate_up = 1e6
    began = time.monotonic()
    assert ask(proxy, "PUT", f"{path}-slow", BODY)[0] == 200
    assert time.monotonic() - began > 0.45
    assert ask(proxy, "GET", f"{path}-slow") == (200, BODY)


def test_a_black_hole_takes_connections_and_answers_none_until_it_ends(proxy: Proxy, path: str) -> None:
    proxy.black_hole = True
    for method in ("GET", "PUT"):
        with pytest.raises(TimeoutError):
            ask(proxy, method, path, b"new" if method == "PUT" else None)
    assert proxy.requests == []
    proxy.black_hole = False
    assert ask(proxy, "GET", path) == (200, BODY)


def test_a_list_is_answered_as_it_was(proxy: Proxy, path: str) -> None:
    folder = path.removeprefix("/bucket/")
    found = f"/bucket?list-type=2&prefix={folder}"
    before = ask(proxy, "GET", found)
    ask(proxy, "PUT", f"{path}-2", b"x")
    proxy.stale(times=2)
    assert [ask(proxy, "GET", found) for _ in range(2)] == [before, before]
    assert ask(proxy, "GET", f"{path}-2") == (200, b"x")
    assert f"{folder}-2".encode() in ask(proxy, "GET", found)[1]


def test_a_field_is_kept_from_the_store(proxy: Proxy, path: str) -> None:
    assert ask(proxy, "PUT", path, b"x", **{"If-None-Match": "*"})[0] == 412
    proxy.strip = "If-None-Match"
    assert ask(proxy, "PUT", path, b"x", **{"If-None-Match": "*"})[0] == 200
    assert ask(proxy, "GET", path) == (200, b"x")
