"""Archive of evidence: a zip whose bytes depend on the records alone, and which checks itself."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from everstep.checked_json import mapping, parse, record, text, whole
from everstep.errors import ConfigError
from everstep.launch.evidence.records import LARGEST, as_text, card, records, summary
from everstep.run_folder import RunFolder
from everstep.security.signing import EVIDENCE, LONGEST, Trust, sign
from everstep.storage.names import is_plain

INDEX, SIGNATURE = "index.json", "index.sig"
SUMMARY, CARD = "evidence.json", "README.md"
FORMAT = 1
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of each file in the archive, so that the same records are the same bytes."""


def write_archive(run: RunFolder, out: Path) -> tuple[int, str]:
    """Write the evidence of a run as one file; return its number of files and the BLAKE3 of its index.

    Raises:
        ConfigError: `out` is there already, or the folder holds no run.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: it is there already; choose another file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it, or choose another")
    found, index = _contents(run)
    signature = sign(EVIDENCE, "", index).encode()
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as staged:
        try:
            with zipfile.ZipFile(staged, "w", zipfile.ZIP_STORED) as archive:
                for name, content in {INDEX: index, **found, **({SIGNATURE: signature} if signature else {})}.items():
                    archive.writestr(_entry(name), content)
            staged.close()
            os.link(staged.name, out)  # an archive that has appeared meanwhile is kept
        except FileExistsError:
            raise ConfigError(f"--out {out}: it is there already; choose another file") from None
        finally:
            os.unlink(staged.name)
    return len(found), blake3(index).hexdigest()


def _contents(run: RunFolder) -> tuple[dict[str, bytes], bytes]:
    """Return the files of an archive by name, and its index."""
    found: dict[str, bytes] = {}
    redacted: dict[str, str] = {}
    for path, stored, shown in records(run):
        found[path] = shown
        if shown != stored:
            redacted[path] = blake3(stored).hexdigest()
    facts = summary(run, found)
    files = {SUMMARY: as_text(facts), CARD: card(facts).encode(), **found}
    listed = {name: {"bytes": len(data), "blake3": blake3(data).hexdigest()} for name, data in files.items()}
    return files, as_text({"format": FORMAT, "files": listed, "redacted": redacted})


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = 0o644 << 16
    entry.create_system = 3
    return entry


def faults(path: Path) -> Iterator[str]:
    """Yield what is wrong with an archive, a line each; nothing if every file is as its index says.

    With a signing key the index must be signed with it; if it is not, it is not parsed.

    Raises:
        ConfigError: the file is no such archive.
    """
    with _opened(path) as archive:
        if fault := _signature_fault(archive):
            yield f"{INDEX}: {fault}"
            return
        index = _index(path, archive)
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if len(sizes) < len(archive.infolist()):
            yield "a name is there twice"
        yield from (f"{name} is missing" for name in sorted(index.keys() - sizes.keys()))
        yield from (f"{name} is not in the index" for name in sorted(sizes.keys() - index.keys() - {INDEX, SIGNATURE}))
        for name in sorted(index.keys() & sizes.keys()):
            size, digest = index[name]
            if sizes[name] != size:
                yield f"{name} has {sizes[name]} bytes, not {size}"
            elif _digest(archive, name) != digest:
                yield f"{name} does not match its BLAKE3"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"--verify {path}: there is no such file") from error
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"--verify {path}: it is no archive of 'everstep evidence', or cut short ({error})"
        ) from error


def is_signed(path: Path) -> bool:
    """True if an archive has a signature, good or not."""
    with _opened(path) as archive:
        return SIGNATURE in archive.namelist()


def _signature_fault(archive: zipfile.ZipFile) -> str:
    """Return the reason why the index may not be trusted; an empty string if it may, or without a key."""
    trust, sizes = Trust(), {entry.filename: entry.file_size for entry in archive.infolist()}
    if not trust.is_on or INDEX not in sizes:
        return ""
    if sizes[INDEX] > LARGEST or sizes.get(SIGNATURE, 0) > LONGEST:
        return f"it or {SIGNATURE} is too large (at most {LARGEST} and {LONGEST} bytes)"
    try:
        signature = archive.read(SIGNATURE).decode(errors="replace") if SIGNATURE in sizes else ""
        return trust.fault(EVIDENCE, "", archive.read(INDEX), signature)
    except zipfile.BadZipFile as error:
        return f"it cannot be read ({error})"


def _index(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, str]]:
    """Return size and digest of each file by name."""
    try:
        if archive.getinfo(INDEX).file_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        document = mapping(parse(archive.read(INDEX)), "it")
        if document.get("format") != FORMAT:
            raise ValueError(f"its format is {document.get('format')}, this version reads {FORMAT}")
        return {_plain(name): _file(name, found) for name, found in mapping(document.get("files"), "files").items()}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        why = "there is none" if isinstance(error, KeyError) else error
        raise ConfigError(f"--verify {path}: its {INDEX} cannot be used: {why}; it is no evidence of a run") from error


def _file(name: str, found: Any) -> tuple[int, str]:
    size, digest = record(found, f"files.{name}", "bytes", "blake3")
    return whole(size, f"the size of {name}", 0, LARGEST), text(digest, f"the digest of {name}", 64)


def _plain(name: str) -> str:
    if not all(is_plain(part) for part in name.split("/")):
        raise ValueError(f"{name[:80]!r} leads out of the archive")
    return name


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    digest = blake3()
    try:
        with archive.open(name) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):  # its own checksum, or it is encrypted
        return ""
    return digest.hexdigest()
