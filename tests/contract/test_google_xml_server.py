"""The server of Google's XML interface refuses what Google's reference says is refused: a client's mistake is seen."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping

import pytest

pytestmark = pytest.mark.process
PART = bytes(5 << 20)


@pytest.fixture
def at(gcs_server: str) -> str:
    """URL of an object that is not there."""
    return f"{gcs_server}/bucket/{uuid.uuid4().hex}"


def ask(method: str, url: str, data: bytes = b"", **fields: str) -> tuple[int, str, Mapping[str, str]]:
    names = {name.replace("_", "-"): value for name, value in fields.items()}
    asked = urllib.request.Request(url, data if method in ("PUT", "POST") else None, names, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def begin(at: str) -> str:
    found = re.search("<UploadId>(.*)</UploadId>", ask("POST", f"{at}?uploads=")[1])
    assert found is not None
    return f"{at}?uploadId={found[1]}"


def send(upload: str, number: int, data: bytes) -> str:
    return ask("PUT", f"{upload}&partNumber={number}", data)[2]["ETag"]


def complete(upload: str, *parts: tuple[int, str]) -> tuple[int, str]:
    inside = "".join(f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>" for number, tag in parts)
    return ask("POST", upload, f"<CompleteMultipartUpload>{inside}</CompleteMultipartUpload>".encode())[:2]


def test_a_precondition_is_kept(at: str) -> None:
    status, _, first = ask("PUT", at, b"first", x_goog_if_generation_match="0")
    assert status == 200
    status, said, _ = ask("PUT", at, b"second", x_goog_if_generation_match="0")
    assert (status, "PreconditionFailed" in said) == (412, True)
    assert ask("GET", at)[1] == "first"
    assert ask("PUT", at, b"third", x_goog_if_generation_match=first["x-goog-generation"])[0] == 200
    assert ask("PUT", at, b"fourth", x_goog_if_generation_match=first["x-goog-generation"])[0] == 412
    assert ask("GET", at)[1] == "third"


def test_parts_are_the_object_when_their_upload_is_complete_and_never_before(at: str) -> None:
    upload = begin(at)
    last, first = send(upload, 2, b"the end"), send(upload, 1, PART)
    assert ask("GET", at)[0] == 404
    assert at.rsplit("/", 1)[1] in ask("GET", f"{at.rsplit('/', 1)[0]}?uploads")[1]
    assert complete(upload, (1, first), (2, last))[0] == 200
    assert ask("GET", at)[1].encode() == PART + b"the end"
    assert complete(upload, (1, first), (2, last)) == complete(upload)
    assert "NoSuchUpload" in complete(upload)[1]


def test_parts_that_do_not_fit_are_refused(at: str) -> None:
    upload = begin(at)
    tags = [send(upload, number, data) for number, data in ((1, PART), (2, b"small"), (3, PART))]
    parts = list(enumerate(tags, 1))
    assert "EntityTooSmall" in complete(upload, *parts)[1]
    assert "InvalidPartOrder" in complete(upload, parts[2], parts[0])[1]
    assert "InvalidPart" in complete(upload, (1, tags[1]))[1]
    assert "InvalidPart" in complete(upload, (4, tags[0]))[1]
    assert "MalformedXML" in complete(upload)[1]
    assert ask("GET", at)[0] == 404
    assert ask("DELETE", upload)[0] == 204
    assert ask("DELETE", upload)[0] == 404
    assert ask("PUT", f"{upload}&partNumber=1", PART)[0] == 404


def test_a_missing_bucket_and_a_missing_object_are_told_apart(at: str, gcs_server: str) -> None:
    nowhere = f"{gcs_server}/nosuch"
    for method, path in (("GET", "/x"), ("PUT", "/x"), ("POST", "/x?uploads="), ("GET", "?list-type=2")):
        status, said, _ = ask(method, nowhere + path)
        assert (status, "NoSuchBucket" in said) == (404, True)
    for method, fields in (("GET", {}), ("DELETE", {}), ("PUT", {"x_goog_copy_source": "bucket/nosuch"})):
        status, said, _ = ask(method, at, **fields)
        assert (status, "NoSuchKey" in said) == (404, True)
