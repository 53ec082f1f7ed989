"""Multipart upload to S3 by s3fs, each part with its own deadline and retries.

s3fs's own files wait forever for a store that accepts a connection and sends nothing: the client waits for permission
to send, and its timeout starts only after sending.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from everstep.errors import StorageError
from everstep.storage.retries import PARALLEL_PARTS
from everstep.storage.upload_stream import Part

Ask = Callable[..., dict[str, Any]]
"""Call a method of S3 for one file, with retries."""


def send_in_parts(ask: Ask, parts: Iterator[Part]) -> None:
    """Upload parts, PARALLEL_PARTS at a time; after an error no file appears and no part remains."""
    upload = ask("create_multipart_upload")["UploadId"]
    try:
        with ThreadPoolExecutor(PARALLEL_PARTS, "part") as pool:
            tags = list(_tags(pool, ask, upload, parts))
        _complete(ask, upload, tags)
    except BaseException:
        with contextlib.suppress(StorageError, FileNotFoundError):  # the first error is the one to raise
            ask("abort_multipart_upload", UploadId=upload)
        raise


def _tags(pool: ThreadPoolExecutor, ask: Ask, upload: str, parts: Iterator[Part]) -> Iterator[str]:
    sent: deque[Future[dict[str, Any]]] = deque()
    try:
        for number, part in enumerate(parts, 1):
            sent.append(pool.submit(ask, "upload_part", UploadId=upload, PartNumber=number, Body=part))
            if len(sent) == PARALLEL_PARTS:
                yield sent.popleft().result()["ETag"]
        while sent:
            yield sent.popleft().result()["ETag"]
    finally:
        for future in sent:
            future.cancel()


def _complete(ask: Ask, upload: str, tags: list[str]) -> None:
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    try:
        ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
    except FileNotFoundError:
        # The response was lost and the upload has ended: successfully, if the file consists of these parts.
        if ask("head_object")["ETag"] != _tag_of(tags):
            raise


def _tag_of(tags: list[str]) -> str:
    whole = hashlib.md5(b"".join(bytes.fromhex(tag.strip('"')) for tag in tags), usedforsecurity=False)
    return f'"{whole.hexdigest()}-{len(tags)}"'
