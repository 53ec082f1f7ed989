"""Registry: models, their versions and aliases, as objects that are created once and never changed.

MODEL/versions/000007.json      a version: its files with size and digest, and what is known of it
MODEL/files/DIGEST/…            the files of versions
MODEL/aliases/ALIAS/000003.json a move of an alias; the highest number is its state

Every change is one create-only write, of which exactly one of many writers succeeds, on every storage. So there is no
lock and no server, a reader sees the state before a change or after it, and the history is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from everstep import checked_json
from everstep.errors import ConfigError, DataError, nearest
from everstep.registry.records import FILE, NAME, AliasMove, FileRecord, Version, author, checked_name, now
from everstep.storage import blocks, open_storage, probe, read_limited

LARGEST_RECORD = 4 << 20
FACTS = "export.json"
CHUNK = 1 << 20


class Registry:
    """The models in one folder, on a disk or in a store."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.storage = open_storage(self.url)

    def models(self) -> list[str]:
        """Return the names of all models."""
        return [name for name in self.storage.names() if NAME.fullmatch(name) and self.versions(name)]

    def versions(self, model: str) -> list[int]:
        """Return the numbers of a model's versions, the oldest first."""
        return _numbers(self.storage.names(f"{checked_name(model, 'model')}/versions"))

    def version(self, model: str, number: int) -> Version:
        """Return a version; ConfigError if there is none, DataError if its record is damaged."""
        place = f"{checked_name(model, 'model')}/versions/{number:06d}.json"
        try:
            return Version.parse(model, number, read_limited(self.storage, place, LARGEST_RECORD))
        except FileNotFoundError:
            raise ConfigError(f"{model}@{number}: {self.url} has no such version{self._there(model)}") from None
        except ValueError as error:
            raise DataError(f"{self.url}/{place}: {error}") from error

    def find(self, word: str) -> Version:
        """Return the version that MODEL, MODEL@7 or MODEL@prod names; MODEL alone is its newest."""
        model, _, which = word.partition("@")
        if which.isdigit():
            return self.version(model, int(which))
        if which:
            return self.version(model, self.state(model, which).version)
        numbers = self.versions(model)
        if not numbers:
            raise ConfigError(f"{model}: {self.url} has no such model{self._there(model)}")
        return self.version(model, numbers[-1])

    def add(self, model: str, folder: str | Path, note: str = "") -> Version:
        """Add the folder of an export as a version, unless one has the same files; return it.

        Raises:
            ConfigError: the folder is no export, or has other folders in it.
        """
        checked_name(model, "model")
        files = _files(Path(folder))
        digest = _digest_of(files)
        probe(self.storage)
        while True:
            known = [self.version(model, number) for number in self.versions(model)]
            for version in known:
                if version.digest == digest:
                    return version
            for name in files:
                self._upload(Path(folder) / name, f"{model}/files/{digest}/{name}")
            facts = _facts(Path(folder))
            number = known[-1].number + 1 if known else 1
            made = Version(model, number, digest, files, facts, note, author(), now())
            if self.storage.create(f"{model}/versions/{number:06d}.json", made.packed()):
                return made

    def aliases(self, model: str) -> dict[str, AliasMove]:
        """Return the state of each alias."""
        return {
            alias: self.state(model, alias) for alias in self.storage.names(f"{checked_name(model, 'model')}/aliases")
        }

    def state(self, model: str, alias: str) -> AliasMove:
        """Return the newest move of an alias; ConfigError if there is no such alias."""
        numbers = self._moves(model, alias)
        if not numbers:
            there = self.storage.names(f"{model}/aliases")
            raise ConfigError(f"{model}@{alias}: {self.url} has no such alias{nearest(alias, there)}")
        return self._move(model, alias, numbers[-1])

    def history(self, model: str, alias: str) -> list[AliasMove]:
        """Return all moves of an alias, the oldest first."""
        return [self._move(model, alias, number) for number in self._moves(model, alias)]

    def promote(self, version: Version, alias: str, why: str = "") -> AliasMove:
        """Point an alias to a version.

        Raises:
            ConfigError: another promotion came first.
        """
        numbers = self._moves(version.model, alias)
        last = self._move(version.model, alias, numbers[-1]) if numbers else None
        if last is not None and last.version == version.number:
            return last
        made = AliasMove(len(numbers) + 1, version.number, last.number if last else 0, "promote", why, author(), now())
        return self._commit(version.model, alias, made)

    def rollback(self, model: str, alias: str, why: str = "") -> AliasMove:
        """Point an alias to the version that it had before; once more goes one further back.

        Raises:
            ConfigError: there is no earlier one, or another change came first.
        """
        last = self.state(model, alias)
        if not last.before:
            raise ConfigError(f"{model}@{alias}: there is no version before {last.version}")
        goal = self._move(model, alias, last.before)
        made = AliasMove(last.number + 1, goal.version, goal.before, "rollback", why, author(), now())
        return self._commit(model, alias, made)

    def fetch(self, version: Version, target: str | Path) -> Path:
        """Copy the files of a version into a new local folder, which appears once each is verified.

        Raises:
            DataError: a file is missing or is not the one that was added.
        """
        goal = Path(target)
        goal.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{goal.name}-", dir=goal.parent))
        try:
            for name, file in version.files.items():
                place = f"{version.model}/files/{version.digest}/{name}"
                with (staged / name).open("xb") as out:
                    self._download(place, file, out)
            os.replace(staged, goal)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return goal

    def _download(self, place: str, file: FileRecord, out: IO[bytes]) -> None:
        digest, size = blake3(), 0
        try:
            for block in blocks(self.storage, place):
                size += len(block)
                if size > file.bytes:
                    break
                digest.update(block)
                out.write(block)
        except FileNotFoundError:
            raise DataError(f"{self.url}/{place} is missing; add the version again") from None
        if size != file.bytes or digest.hexdigest() != file.blake3:
            raise DataError(f"{self.url}/{place} is not the file that was added (BLAKE3); nothing of it was used")

    def _upload(self, file: Path, place: str) -> None:
        with file.open("rb") as source, self.storage.writer(place) as out:
            shutil.copyfileobj(source, out, CHUNK)

    def _moves(self, model: str, alias: str) -> list[int]:
        return _numbers(self.storage.names(f"{checked_name(model, 'model')}/aliases/{checked_name(alias, 'alias')}"))

    def _move(self, model: str, alias: str, number: int) -> AliasMove:
        place = f"{model}/aliases/{alias}/{number:06d}.json"
        try:
            return AliasMove.parse(number, read_limited(self.storage, place, LARGEST_RECORD), place)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{self.url}/{place}: {error}") from error

    def _commit(self, model: str, alias: str, made: AliasMove) -> AliasMove:
        probe(self.storage)
        if not self.storage.create(f"{model}/aliases/{alias}/{made.number:06d}.json", made.packed()):
            other = self.state(model, alias)
            raise ConfigError(
                f"{model}@{alias}: {other.by} has just moved it to version {other.version}; look at it, and try again"
            )
        return made

    def _there(self, model: str) -> str:
        numbers = self.versions(model) if self.storage.names(model) else []
        if numbers:
            return f"; there are {', '.join(map(str, numbers[-10:]))}"
        return nearest(model, self.models())


def _numbers(names: list[str]) -> list[int]:
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit() and len(stem) >= 6)


def _files(folder: Path) -> dict[str, FileRecord]:
    """Return the files of an export with their digests."""
    if not (folder / FACTS).is_file():
        raise ConfigError(f"{folder} is not the folder of an export: it has no {FACTS}; make one with everstep export")
    return {name: FileRecord(path.stat().st_size, _blake3(path)) for name, path in _entries(folder)}


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


def _digest_of(files: dict[str, FileRecord]) -> str:
    lines = (f"{name}\0{file.bytes}\0{file.blake3}\n" for name, file in sorted(files.items()))
    return blake3("".join(lines).encode()).hexdigest()


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return checked_json.mapping(checked_json.parse((folder / FACTS).read_bytes()), FACTS)
    except ValueError as error:
        raise ConfigError(f"{folder / FACTS}: {error}") from error
