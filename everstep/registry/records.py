"""Records of a registry, checked when they are read: a version with its files, a move of an alias."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everstep import checked_json as check
from everstep.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
MOST_FILES = 10_000
LONGEST_REASON = 2000
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size and BLAKE3 of a file."""

    bytes: int
    blake3: str


@dataclass(frozen=True)
class Version:
    """One version of a model: it never changes."""

    model: str
    number: int
    digest: str
    """Digest of all names, sizes and digests of its files; also the name of their folder."""
    files: Mapping[str, FileRecord]
    facts: Mapping[str, Any]
    """Facts of the export: checkpoint, format, figures."""
    note: str
    by: str
    time: float

    def __str__(self) -> str:
        return f"{self.model}@{self.number}"

    def packed(self) -> bytes:
        """Return the record as a line of JSON."""
        files = {name: [file.bytes, file.blake3] for name, file in sorted(self.files.items())}
        fields = ("digest", "facts", "note", "by", "time")
        return _line({"files": files, **{name: getattr(self, name) for name in fields}})

    @classmethod
    def parse(cls, model: str, number: int, data: bytes) -> Version:
        """Return a record that is safe to use; ValueError if it is not valid."""
        place = f"version {number} of {model}"
        files, digest, facts, note, by, at = check.record(
            check.parse(data), place, "files", "digest", "facts", "note", "by", "time"
        )
        found: dict[str, FileRecord] = {}
        for name, pair in check.mapping(files, f"{place}: files", MOST_FILES).items():
            if not FILE.fullmatch(name):
                raise ValueError(f"{place}: {check.shown(name)} is no name of a file")
            size, hexes = check.sequence(pair, f"{place}: {name}", 2)
            found[name] = FileRecord(check.whole(size, f"{place}: size of {name}"), _digest(hexes, f"{place}: {name}"))
        return cls(
            model,
            number,
            _digest(digest, place),
            found,
            check.mapping(facts, f"{place}: facts"),
            check.text(note, f"{place}: note", LONGEST_REASON),
            check.text(by, f"{place}: by"),
            check.number(at, f"{place}: time", 0, check.LATEST),
        )


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias to a version. The newest is its state, all together are its history."""

    number: int
    version: int
    before: int
    """Number of the move whose state a rollback brings back; 0 if there is none."""
    kind: str
    """promote or rollback."""
    why: str
    by: str
    time: float

    def packed(self) -> bytes:
        """Return the record as a line of JSON with a token, so that no other writer has the same bytes."""
        fields = ("version", "before", "kind", "why", "by", "time")
        return _line({"token": uuid.uuid4().hex, **{name: getattr(self, name) for name in fields}})

    @classmethod
    def parse(cls, number: int, data: bytes, place: str) -> AliasMove:
        """Return a record that is safe to use; ValueError if it is not valid."""
        tree = check.mapping(check.parse(data), place)
        tree.pop("token", None)
        version, before, kind, why, by, at = check.record(tree, place, "version", "before", "kind", "why", "by", "time")
        return cls(
            number,
            check.whole(version, f"{place}: version", 1),
            check.whole(before, f"{place}: before", 0, number - 1),
            check.text(kind, f"{place}: kind"),
            check.text(why, f"{place}: why", LONGEST_REASON),
            check.text(by, f"{place}: by"),
            check.number(at, f"{place}: time", 0, check.LATEST),
        )


def author() -> str:
    """Return user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def now() -> float:
    return round(time.time(), 3)


def checked_name(name: str, what: str) -> str:
    """Return the name of a model or alias; ConfigError if it is none."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{what}={name!r}: letters a-z, digits, '.', '_' and '-' only (at most 64); choose another name"
        )
    return name


def checked_reason(text: str, what: str) -> str:
    """Return a reason or note; ConfigError if it is longer than a reader takes."""
    if len(text) > LONGEST_REASON:
        raise ConfigError(f"{what}: {len(text)} characters (at most {LONGEST_REASON}); write less")
    return text


def _digest(value: object, place: str) -> str:
    if type(value) is not str or not DIGEST.fullmatch(value):
        raise ValueError(f"{place} has {check.shown(value)} in the place of a digest")
    return value


def _line(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()
