"""Folder of an export: its files with their digests, its facts, and its signature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from everstep import checked_json
from everstep.errors import ConfigError
from everstep.registry.records import FILE, FileRecord
from everstep.security.signing import EXPORT, LONGEST, Trust, sign

FACTS, SIGNATURE = "export.json", "export.sig"
CHUNK = 1 << 20


def sign_folder(folder: Path) -> None:
    """Write the signature of all files of an export beside them, if a key is set."""
    signature = sign(EXPORT, "", digest_of(files_of(folder)).encode())
    if signature:
        (folder / SIGNATURE).write_text(f"{signature}\n")


def files_of(folder: Path) -> dict[str, FileRecord]:
    """Return the files of an export with their digests; ConfigError if it is none."""
    if not (folder / FACTS).is_file():
        raise ConfigError(f"{folder} is not the folder of an export: it has no {FACTS}; make one with everstep export")
    return {name: FileRecord(path.stat().st_size, _blake3(path)) for name, path in _entries(folder)}


def check_signature(folder: Path, files: Mapping[str, FileRecord], trust: Trust) -> None:
    """Raise ConfigError if a key is set and the export was not signed with it."""
    signature = ""
    if trust.is_on and SIGNATURE in files:
        if files[SIGNATURE].bytes > LONGEST:
            raise ConfigError(f"{folder / SIGNATURE}: {files[SIGNATURE].bytes} bytes (at most {LONGEST}); export again")
        signature = (folder / SIGNATURE).read_bytes().decode(errors="replace").strip()
    signed = {name: file for name, file in files.items() if name != SIGNATURE}
    if fault := trust.fault(EXPORT, "", digest_of(signed).encode(), signature):
        raise ConfigError(f"{folder}: {fault}; export it again, with the key set")


def digest_of(files: Mapping[str, FileRecord]) -> str:
    """Return one digest of all names, sizes and digests."""
    lines = (f"{name}\0{file.bytes}\0{file.blake3}\n" for name, file in sorted(files.items()))
    return blake3("".join(lines).encode()).hexdigest()


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts of an export; ConfigError if they are not valid."""
    try:
        return checked_json.mapping(checked_json.parse((folder / FACTS).read_bytes()), FACTS)
    except ValueError as error:
        raise ConfigError(f"{folder / FACTS}: {error}") from error


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not FILE.fullmatch(path.name):
            raise ConfigError(f"{path}: a version has plain files only; remove it")
        yield path.name, path


def _blake3(path: Path) -> str:
    digest = blake3()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
