"""Deadlines and retries of storage requests: one deadline per call, and full jitter between attempts.

The clients' own retries are off: nested retry loops multiply.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from everstep.errors import StorageError

T = TypeVar("T")

DEADLINE_S = 90.0
"""Seconds after which a call is not retried: a store, switch or name server restarts in a minute."""
DEADLINE = "EVERSTEP_STORAGE_DEADLINE_S"
"""Environment variable that overrides DEADLINE_S, for stores with longer outages."""
CONNECT_S = 5.0
"""Timeout to open a connection, in seconds; across an ocean it takes 0.3 s."""
QUIET_S = 15.0
"""Timeout without a byte of the response, in seconds. Stores respond in 0.1 s, at most 2 s."""
SEND_S = 75.0
"""Timeout of sending up to a part, in seconds: enough for PARALLEL_PARTS at once over 1 MB/s."""
QUIET_FOR_S, SAY_EVERY_S = 5.0, 60.0
"""Seconds of failure before the first message, and between two messages."""
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0
"""Longest wait between attempts, in seconds.

Waits are drawn from 0 to FIRST_DELAY_S, twice that and so on up to this limit, so a call ends at most this long after
an outage.
"""
PART_BYTES = 16 << 20
"""Part size of an upload in bytes; S3 accepts 10,000 parts, so files of up to 160 GB."""
PARALLEL_PARTS = 4
"""Parts of one file in flight. A writer takes 130 MB of memory with obstore, 200 MB with s3fs."""

PASSING = (408, 409, 423, 425, 429)
"""HTTP statuses 4xx that are worth a retry."""
REFUSED = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.EMSGSIZE)
"""Errors that a retry does not change."""
PASSING_CODES = ("IncompleteBody", "BadDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")
"""Codes with status 400 of a request that was damaged in transit."""
_JITTER = random.SystemRandom()
"""Separate from Python's generator: saves wait in threads, while user code draws from that generator."""
_STATUS = re.compile(r"\bstatus(?: code)?:? (\d{3})\b")


def retry(work: Callable[[], T], what: str) -> T:
    """Run `work`, with retries after transient faults; one-line StorageError at the deadline.

    A missing file, an existing one and a refusal are raised at once.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            return work()
        except Exception as error:
            lasts = lasting(error, what)
            if lasts is error:
                raise
            if lasts is not None:
                raise lasts from error
            tries += 1
            delay_s = _JITTER.uniform(0, min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(tries - 1, 20)))
            passed_s = time.monotonic() - began
            if passed_s + delay_s > deadline_s():
                away = StorageError(f"{what}: gave up after {passed_s:.0f} s, {tries} tries: {reason(error)}")
                away.passing = True
                raise away from error
            if passed_s > QUIET_FOR_S:
                _say(f"waiting for the store, {tries} tries so far: {what}: {reason(error)}")
            time.sleep(delay_s)


_said_at = float("-inf")


def _say(line: str) -> None:
    """Print a message about the wait, at most once per SAY_EVERY_S and only on rank 0."""
    global _said_at
    if os.environ.get("RANK", "0") == "0" and time.monotonic() - _said_at > SAY_EVERY_S:
        _said_at = time.monotonic()
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn errors of a client into one-line StorageErrors, for work that cannot be retried."""
    try:
        yield
    except Exception as error:
        lasts = lasting(error, what)
        if lasts is error:
            raise
        raise lasts or StorageError(f"{what}: {reason(error)}") from error


def deadline_s() -> float:
    """Return the seconds after which a call is not retried."""
    text = os.environ.get(DEADLINE, "")
    try:
        return float(text) if text else DEADLINE_S
    except ValueError:
        raise StorageError(f"{DEADLINE}={text} is not a number of seconds") from None


def lasting(error: Exception, what: str) -> Exception | None:
    """Return the exception to raise for an error that a retry does not change; None for a transient one."""
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError | StorageError):
        return error
    # Clients of stores have their own exceptions. Among Python's, all but OSError indicate a bug.
    if type(error).__module__ == "builtins" and not isinstance(error, OSError):
        return error
    if any(code in f"{error} {error.__cause__}" for code in PASSING_CODES):
        return None
    if "Credentials" in type(error).__name__:
        return StorageError(f"{what}: {reason(error)}")
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{what}: permission denied ({reason(error)})")
    # A missing file is FileNotFoundError in obstore; another 404 may come from a credentials address.
    elsewhere = type(error).__name__ == "GenericError" and not re.search("NoSuchBucket|ContainerNotFound", str(error))
    if status in (404, 410) and not elsewhere:
        return FileNotFoundError(f"{what}: {reason(error)}")
    refused = isinstance(error, OSError) and error.errno in REFUSED
    if refused or (400 <= status < 500 and status not in PASSING):
        refusal = StorageError(f"{what}: the store refuses: {reason(error)}")
        refusal.passing = refused  # a full or read-only disk behind it
        return refusal
    return None


def status_of(error: BaseException) -> int:
    """Return the HTTP status in an exception of any client; 0 without one."""
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and value >= 100:
            return value
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def is_beyond_the_end(error: BaseException) -> bool:
    """True if a store refuses a range because the file is shorter."""
    return status_of(error) == 416 or "InvalidRange" in f"{error} {error.__cause__}"


def reason(error: BaseException) -> str:
    """Return a client's error in one line, without debug text and without queries, which may be signed."""
    text = str(error).split("Debug source", 1)[0]
    words = " ".join(re.sub(r"\?[^\s>]*", "", text).split()) or type(error).__name__
    code, message = re.search(r"<Code>([^<]*)</Code>", words), re.search(r"<Message>([^<]*)</Message>", words)
    if code is not None:
        return f"{code[1]}: {message[1]}" if message is not None else code[1]
    return words if len(words) <= 300 else f"{words[:300]}…"


def has_won(read: Callable[[], bytes], data: bytes) -> bool:
    """After a conflict, return True if the present file is ours.

    When the response to a create is lost, the retry meets the file of the first try; the content decides.
    """
    try:
        return read() == data
    except FileNotFoundError:  # two at once: S3 refuses both and asks for a retry
        raise ConnectionError("the store reports a file that is not there") from None
