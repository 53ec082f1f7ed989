"""Registry: models, their versions and aliases, as objects that are created once and never changed.

MODEL/versions/000007.json      a version: its files with size and digest, and what is known of it
MODEL/files/DIGEST/…            the files of versions
MODEL/aliases/ALIAS/000003.json a move of an alias; the highest number is its state

Every change is one create-only write, of which exactly one of many writers succeeds, on every storage. So there is no
lock and no server, a reader sees the state before a change or after it, and the history is complete.

A record is a line of JSON. With a signing key a second line is its signature, which holds for this model, alias and
number alone; it is verified before the JSON is parsed. The signature of an export says nothing of the name and number
that the files get here, so records have signatures of their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from blake3 import blake3

from everstep.errors import ConfigError, DataError, nearest
from everstep.registry.export_folder import CHUNK, check_signature, digest_of, facts_of, files_of
from everstep.registry.records import NAME, AliasMove, FileRecord, Version, author, checked_name, checked_reason, now
from everstep.security.signing import REGISTRY, Trust, check_signer, sign
from everstep.storage import blocks, open_storage, probe, read_limited

LARGEST_RECORD = 4 << 20


class MovedError(ConfigError):
    """An alias was moved by another, between the decision and this move."""


class Registry:
    """The models in one folder, on a disk or in a store.

    Args:
        trusted: public keys of ed25519, of which one must have signed each record; None asks for the key in
            EVERSTEP_SIGNING_KEY, if there is one.
    """

    def __init__(self, url: str, trusted: str | Sequence[str] | None = None) -> None:
        self.url = url.rstrip("/")
        self.trust = Trust(trusted)
        self.storage = open_storage(self.url)

    def models(self) -> list[str]:
        """Return the names of all models."""
        return [name for name in self.storage.names() if NAME.fullmatch(name) and self.versions(name)]

    def versions(self, model: str) -> list[int]:
        """Return the numbers of a model's versions, the oldest first."""
        return _numbers(self.storage.names(f"{checked_name(model, 'model')}/versions"))

    def version(self, model: str, number: int) -> Version:
        """Return a version; ConfigError if there is none, DataError if its record is damaged or not trusted."""
        place = f"{checked_name(model, 'model')}/versions/{number:06d}.json"
        try:
            return Version.parse(model, number, self._read(place))
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
        check_signer()
        checked_reason(note, "note")
        files = files_of(Path(folder))
        check_signature(Path(folder), files, self.trust)
        digest = digest_of(files)
        probe(self.storage)
        while True:
            numbers = self.versions(model)
            for number in numbers:
                # A version from before the key, or by someone without it, does not keep a signed one out.
                place = f"{model}/versions/{number:06d}.json"
                if not self._fault(place) and (version := self.version(model, number)).digest == digest:
                    return version
            for name in files:
                self._upload(Path(folder) / name, f"{model}/files/{digest}/{name}")
            number = numbers[-1] + 1 if numbers else 1
            made = Version(model, number, digest, files, facts_of(Path(folder)), note, author(), now())
            if self._create(f"{model}/versions/{number:06d}.json", made.packed()):
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

    def newest(self, model: str, alias: str) -> AliasMove | None:
        """Return the newest move of an alias; None if there is no such alias."""
        return self.state(model, alias) if self._moves(model, alias) else None

    def promote(self, version: Version, alias: str, why: str = "", after: int | None = None) -> AliasMove:
        """Point an alias to a version.

        Args:
            after: number of the alias's last move (0: none) that the decision was made for; None takes any.

        Raises:
            MovedError: another promotion came first.
        """
        check_signer()
        numbers = self._moves(version.model, alias)
        if after is not None and after != (numbers[-1] if numbers else 0):
            raise self._moved(version.model, alias)
        place = f"{version.model}/aliases/{alias}/{numbers[-1] if numbers else 0:06d}.json"
        # A move that is not trusted is followed by this one, and no rollback leads back to it.
        last = self._move(version.model, alias, numbers[-1]) if numbers and not self._fault(place) else None
        if last is not None and last.version == version.number:
            return last
        number = numbers[-1] + 1 if numbers else 1
        made = AliasMove(number, version.number, last.number if last else 0, "promote", why, author(), now())
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
            return AliasMove.parse(number, self._read(place), place)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{self.url}/{place}: {error}") from error

    def _create(self, place: str, line: bytes) -> bool:
        """Write a record, signed if there is a key; False if it is there already."""
        signature = sign(REGISTRY, place, line)
        return self.storage.create(place, line + (f"{signature}\n".encode() if signature else b""))

    def _read(self, place: str) -> bytes:
        """Return the line of a record, whose signature is good; DataError if it is not."""
        line, signature = self._lines(place)
        if fault := self.trust.fault(REGISTRY, place, line, signature):
            raise DataError(f"{self.url}/{place}: {fault}; nothing of it was used")
        return line

    def _fault(self, place: str) -> str:
        """Return the reason why a record may not be trusted; an empty string if it may."""
        line, signature = self._lines(place)
        return self.trust.fault(REGISTRY, place, line, signature)

    def _lines(self, place: str) -> tuple[bytes, str]:
        line, end, signature = read_limited(self.storage, place, LARGEST_RECORD).partition(b"\n")
        return line + end, signature.decode(errors="replace").strip()

    def _commit(self, model: str, alias: str, made: AliasMove) -> AliasMove:
        checked_reason(made.why, "why")
        probe(self.storage)
        if not self._create(f"{model}/aliases/{alias}/{made.number:06d}.json", made.packed()):
            raise self._moved(model, alias)
        return made

    def _moved(self, model: str, alias: str) -> MovedError:
        other = self.state(model, alias)
        return MovedError(
            f"{model}@{alias}: {other.by} has just moved it to version {other.version}; look at it, and try again"
        )

    def _there(self, model: str) -> str:
        numbers = self.versions(model) if self.storage.names(model) else []
        if numbers:
            return f"; there are {', '.join(map(str, numbers[-10:]))}"
        return nearest(model, self.models())


def _numbers(names: list[str]) -> list[int]:
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit() and len(stem) >= 6)
