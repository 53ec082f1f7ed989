"""How long a store may take and how often it is asked: one deadline for each verb, full jitter between the tries.

Both clients are told not to try again by themselves: two loops of retries, one in the other, multiply.
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
"""After this no verb is tried again: longer than the minute that a store, a switch or a name server restarts in."""
DEADLINE = "EVERSTEP_STORAGE_DEADLINE_S"
"""Environment variable in place of DEADLINE_S, since only the user knows how long his store is ever away."""
CONNECT_S = 5.0
"""To open a connection; over the ocean it takes 0.3 s."""
QUIET_S = 15.0
"""Without a byte of an answer. Stores answer in 0.1 s and within 2 s at their slowest."""
SEND_S = 75.0
"""For one request that sends up to a part's bytes: PARALLEL_PARTS of them at once through a line of 1 MB/s."""
QUIET_FOR_S, SAY_EVERY_S = 5.0, 60.0
"""Seconds for which a verb fails before that is said, and between two lines about it."""
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0
"""Waits are drawn from 0 to FIRST_DELAY_S, twice that and so on to this, so an outage is outlived by at most this."""
PART_BYTES = 16 << 20
"""Of a file that is uploaded in parts; S3 takes 10,000 of them, so files of up to 160 GB."""
PARALLEL_PARTS = 4
"""Parts of one file on their way at once. With copies a writer holds 130 MB of memory by obstore, 200 by s3fs."""

PASSING = (408, 409, 423, 425, 429)
"""Of the statuses 4xx, those that are worth another try."""
REFUSED = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS, errno.EMSGSIZE)
"""What will be the same however often it is tried."""
PASSING_CODES = ("IncompleteBody", "BadDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")
"""Of the codes of status 400, those of a request that was damaged on its way."""
_JITTER = random.SystemRandom()
"""Not Python's own generator: saves wait in threads, while code of users draws from that one."""
_STATUS = re.compile(r"\bstatus(?: code)?:? (\d{3})\b")


def retry(work: Callable[[], T], what: str) -> T:
    """Do `work`, again after a fault that may pass; StorageError in one line when the store stays unwell.

    What is not there, is there already or is refused is said at once.
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
    """Tell the user, now and then, what is waited for; of several ranks the first does."""
    global _said_at
    if os.environ.get("RANK", "0") == "0" and time.monotonic() - _said_at > SAY_EVERY_S:
        _said_at = time.monotonic()
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """For what cannot be tried again: an error of a client is a StorageError of one line."""
    try:
        yield
    except Exception as error:
        lasts = lasting(error, what)
        if lasts is error:
            raise
        raise lasts or StorageError(f"{what}: {reason(error)}") from error


def deadline_s() -> float:
    """Seconds after which no verb is tried again."""
    text = os.environ.get(DEADLINE, "")
    try:
        return float(text) if text else DEADLINE_S
    except ValueError:
        raise StorageError(f"{DEADLINE}={text} is not a number of seconds") from None


def lasting(error: Exception, what: str) -> Exception | None:
    """What to raise for an error that no further try would change; None for one that may pass."""
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError | StorageError):
        return error
    # Clients of stores have exceptions of their own; of Python's own, all but OSError is a fault of ours.
    if type(error).__module__ == "builtins" and not isinstance(error, OSError):
        return error
    if any(code in f"{error} {error.__cause__}" for code in PASSING_CODES):
        return None
    if "Credentials" in type(error).__name__:
        return StorageError(f"{what}: {reason(error)}")
    status = status_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{what}: permission denied ({reason(error)})")
    # obstore says by FileNotFoundError which file is missing; another 404 of it may be that of an address for keys.
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
    """The HTTP status that an exception of any client speaks of; 0 when it speaks of none."""
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and value >= 100:
            return value
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def is_beyond_the_end(error: BaseException) -> bool:
    """Whether a store refuses a range because the file is shorter."""
    return status_of(error) == 416 or "InvalidRange" in f"{error} {error.__cause__}"


def reason(error: BaseException) -> str:
    """An error of a client as part of one line: without its debug text, and without queries, which may be signed."""
    text = str(error).split("Debug source", 1)[0]
    words = " ".join(re.sub(r"\?[^\s>]*", "", text).split()) or type(error).__name__
    code, message = re.search(r"<Code>([^<]*)</Code>", words), re.search(r"<Message>([^<]*)</Message>", words)
    if code is not None:
        return f"{code[1]}: {message[1]}" if message is not None else code[1]
    return words if len(words) <= 300 else f"{words[:300]}…"


def has_won(read: Callable[[], bytes], data: bytes) -> bool:
    """After a conflict: whether what is there is ours.

    An answer that got lost is asked for again and then meets its own file: what counts is whose bytes are there.
    """
    try:
        return read() == data
    except FileNotFoundError:  # two at once: S3 refuses both and says that one should try again
        raise ConnectionError("the store reports a file that is not there") from None
