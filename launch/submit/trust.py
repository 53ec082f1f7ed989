"""Trust in a run folder: its code and commands run only if this user wrote them or names them again.

Each launcher that writes job.yaml writes AUTHOR into the same folder: keyed digests (HMAC-SHA-256) of everything that
the folder can make run. The key is in the state folder of the user. A folder that another user wrote or changed lacks
valid digests: `everstep resume` then lists what it would run, and starts nothing without --trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.config.dotted import leaves
from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.config.job import plain_job
from everstep.run_folder import LARGEST_RECORD, TASK_MODULE
from everstep.security.config_trust import CODE_KEYS, SHOWN
from everstep.security.ownership import create_private, other_reader, other_writer
from everstep.storage import Storage, read_limited

AUTHOR = "author.json"
"""File in a run folder, or in that of a sweep."""
KEY_BYTES = 32
STATE = "XDG_STATE_HOME"
"""Environment variable: folder of the states of all programs of a user."""
KEPT = 8
"""Digests of each part that are kept, the newest last."""


@dataclass(frozen=True)
class Runnable:
    """Parts of a run folder that name code or commands."""

    job: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the job in CODE_KEYS that differ from their defaults, dotted: env.PATH, setup."""
    plugins: tuple[str, ...] = ()
    code: str | None = None
    """Place of the code snapshot, as in a submission."""
    argv: tuple[str, ...] = ()
    """Program in place of the trainer."""
    module: str | None = None
    """Digest of the module that Python code has written into the folder, with `everstep.train`."""

    @staticmethod
    def of(job: JobConfig, plugins: Sequence[str] = (), code: str | None = None, argv: Sequence[str] = ()) -> Runnable:
        usual, given = dict(leaves(plain_job(JobConfig()))), dict(leaves(plain_job(job)))
        differs = {key: value for key, value in given.items() if usual.get(key) != value}
        return Runnable(
            {key: differs[key] for key in differs if key.split(".")[0] in CODE_KEYS}, tuple(plugins), code, tuple(argv)
        )

    def of_folder(self, storage: Storage) -> Runnable:
        """Return the same with the module that the folder has."""
        import hashlib  # imported late, as it loads OpenSSL

        try:
            text = read_limited(storage, TASK_MODULE, LARGEST_RECORD)
        except FileNotFoundError:
            return self
        except ValueError as error:
            raise ConfigError(f"run={storage.url}: {error}; it is no module of everstep.train, so remove it") from error
        return dataclasses.replace(self, module=hashlib.sha256(text).hexdigest())

    def beyond(self, said: Runnable) -> list[str]:
        """Return a short text for each part that is not in `said`, the parts that the command line names."""
        found = [f"job.{key}={_short(value)}" for key, value in self.job.items() if said.job.get(key) != value]
        found += [f"its own code ({self.code})"] if self.code not in (None, said.code) else []
        found += [f"its own program ({_short(self.argv)})"] if self.argv not in ((), said.argv) else []
        found += [f"its own {TASK_MODULE}"] if self.module is not None else []
        named = [name for name in self.plugins if name not in said.plugins]
        return found + ([f"plugins=[{','.join(named)}]"] if named else [])

    def macs(self, key: bytes) -> dict[str, str]:
        """Return a keyed digest of each part: a later start may renew one and keep the others."""
        import hashlib  # imported late, as it loads OpenSSL
        import hmac

        parts = {"job": self.job, "plugins": self.plugins, "code": self.code, "argv": self.argv, "module": self.module}
        texts = {name: json.dumps([name, part], sort_keys=True, default=str) for name, part in parts.items() if part}
        return {name: hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for name, text in texts.items()}


def sign(storage: Storage, runnable: Runnable) -> None:
    """Write the user's keyed digests into the folder; nothing if the user has no state folder."""
    key = _key()
    if key is None or not (macs := runnable.macs(key)):
        return
    known = _read(storage)
    # Earlier ones are kept, as a launcher may be killed between this write and that of job.yaml.
    merged = known | {part: _with(known.get(part, []), mac) for part, mac in macs.items()}
    if merged != known:
        storage.write(AUTHOR, (json.dumps(merged) + "\n").encode())


def _with(known: list[str], mac: str) -> list[str]:
    return [*(each for each in known if each != mac), mac][-KEPT:]


def is_ours(storage: Storage, runnable: Runnable) -> bool:
    """True if this user has signed all parts."""
    key = _key()
    if key is None:
        return False
    known = _read(storage)
    return all(mac in known.get(part, []) for part, mac in runnable.macs(key).items())


def refuse_foreign(
    storage: Storage,
    recorded: Runnable,
    used: Runnable,
    said: Runnable,
    trusted: bool = False,
    fix: str = "add --trust, or name these keys yourself",
) -> None:
    """Raise ConfigError if a folder that another user wrote would make something run.

    Args:
        recorded: parts as the folder has them.
        used: parts after the changes of the command line.
        said: parts that the command line names.
        trusted: True with --trust.
        fix: advice for a user who trusts the folder.
    """
    left = used.beyond(said)
    if trusted or not left or is_ours(storage, recorded):
        return
    raise ConfigError(
        f"run={storage.url}: it would run {'; '.join(left)}, and nothing shows that you wrote this ({AUTHOR} is not by "
        f"the key in {state_folder()}: another user, a later change, or another home); if you trust those who can "
        f"write there, {fix}"
    )


def _read(storage: Storage) -> dict[str, list[str]]:
    try:
        found = json.loads(storage.read(AUTHOR))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    lists = found.items() if isinstance(found, dict) else ()
    return {str(part): [str(mac) for mac in macs] for part, macs in lists if isinstance(macs, list)}


def state_folder() -> Path:
    """Return the user's folder for Everstep's own state."""
    home = os.environ.get(STATE) or "~/.local/state"
    return Path(home).expanduser() / "everstep"


def _key() -> bytes | None:
    """Return the user's key, made at the first use; None if there is no place to keep it.

    Raises:
        ConfigError: another user can read or has written the key.
    """
    folder = state_folder()
    file = folder / "key"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if why := other_writer(folder.stat()):
            raise ConfigError(
                f"{STATE}={folder.parent}: {folder} {why}, so others could make your key; chmod 700 it, or set {STATE}"
            )
        if not file.exists():
            _make(file)
        seen = file.lstat()
        if why := other_reader(seen) if stat.S_ISREG(seen.st_mode) else "is no file":
            raise ConfigError(f"{STATE}={folder.parent}: {file} {why}; remove it to get a new key")
        return file.read_bytes()
    except OSError:
        return None


def _make(file: Path) -> None:
    """Create the key whole or not at all: other launchers may start at the same moment."""
    staged = file.with_name(f".key-{secrets.token_hex(8)}")
    try:
        create_private(staged, secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(staged, file)
    finally:
        staged.unlink(missing_ok=True)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
