"""Provenance of a run: code, packages, command and config, recorded in the run folder."""

from __future__ import annotations

import datetime
import getpass
import hashlib
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everstep import __version__
from everstep.config import RunConfig
from everstep.frozen_config import digest
from everstep.run_folder import PROVENANCE, RunFolder
from everstep.security.secret_detection import SCANNED_BYTES, holds_secret, is_secret_file, without_secrets

LARGEST_DIFF = 256 * 1024
"""Largest uncommitted diff in bytes that is kept in full; of a larger one only size and hash are kept."""


def record(
    folder: RunFolder,
    config: RunConfig,
    command: Sequence[str],
    snapshot: str | None = None,
    around: Mapping[str, Any] | None = None,
) -> None:
    """Record the provenance once; resumed runs keep the first record.

    Args:
        snapshot: digest of the code snapshot.
        around: result of `surroundings`, for a caller that starts many runs; None computes it.
    """
    if folder.storage.exists(PROVENANCE):
        return
    found = {**facts(config, command, around), "snapshot": snapshot}
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    folder.storage.create(PROVENANCE, text.encode())


def facts(config: RunConfig, command: Sequence[str], around: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        **(surroundings() if around is None else around),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "config_digest": digest(config),
    }


def surroundings() -> dict[str, Any]:
    """Return the facts common to all runs that this process starts; takes a tenth of a second."""
    return {
        "everstep": __version__,
        "host": socket.gethostname(),
        "user": user(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "code": code(),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Return the version of every installed distribution, without importing any."""
    from importlib.metadata import distributions

    every = [found.metadata for found in distributions()]  # each `metadata` reads and parses a file
    return {str(one["Name"]).lower(): one["Version"] for one in every if one["Name"]}


def code(folder: str = ".") -> dict[str, Any] | None:
    """Return commit and uncommitted diff of the checkout in `folder`; None without git or a checkout.

    The remote is left out: its URL may hold a password. So are changes of files that look like secrets or hold one.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    names = (_git(folder, "diff", "HEAD", "--name-only", "-z") or b"").decode(errors="replace").split("\0")
    top = Path((_git(folder, "rev-parse", "--show-toplevel") or b".").decode(errors="replace").rstrip("\n"))
    hidden = [f":(exclude,top,literal){name}" for name in names if name and _is_secret(top, name)]
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ":(top)", *hidden) or b""
    digest = hashlib.sha256(diff).hexdigest()
    facts = {"commit": commit.decode().strip(), "changed": any(names), "diff_sha256": digest}
    return {
        **facts,
        **(
            {"diff_bytes": len(diff)}
            if len(diff) > LARGEST_DIFF
            else {"diff": without_secrets(diff.decode(errors="replace"))}
        ),
    }


def _is_secret(top: Path, name: str) -> bool:
    if is_secret_file(name):
        return True
    try:
        with (top / name).open("rb") as file:
            return holds_secret(file.read(SCANNED_BYTES))
    except OSError:  # removed, or a folder: without_secrets covers what the diff shows of it
        return False


def _git(folder: str, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, timeout=30, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a UID without a name
        return "unknown"
