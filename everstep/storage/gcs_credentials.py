"""Credentials of Google's store, for gcsfs and obstore: a key file that the environment names.

obstore reads two kinds of such files itself; google-auth reads the others, such as those of workload identities.
"""

from __future__ import annotations

import json
import os
from datetime import UTC
from functools import partial
from pathlib import Path
from typing import Any

from everstep.errors import StorageError
from everstep.storage import credentials
from everstep.storage.retries import QUIET_S

SAYS = "GOOGLE_APPLICATION_CREDENTIALS"
EMULATOR = "STORAGE_EMULATOR_HOST"
"""Environment variable: address of an emulator, which needs no credentials."""
BASE_URL = "GOOGLE_BASE_URL"
"""Environment variable of obstore, in place of https://storage.googleapis.com."""
TAKEN_FIRST = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "SERVICE_ACCOUNT",
)
"""Variables that obstore uses before GOOGLE_APPLICATION_CREDENTIALS; this cannot be disabled."""
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
READ_BY_OBSTORE = ("service_account", "authorized_user")


def endpoint() -> str | None:
    """Return the URL of the server when it is not Google's own."""
    host = os.environ.get(EMULATOR)
    if host and "://" not in host:
        host = f"http://{host}"
    return (host or os.environ.get(BASE_URL, "")).rstrip("/") or None


def others() -> list[str]:
    """Return those of TAKEN_FIRST that are set."""
    return [name for name in TAKEN_FIRST if os.environ.get(name)]


def for_gcsfs(url: str) -> Any:
    """Return the value of gcsfs's `token`; StorageError without credentials."""
    if _open():
        return "anon"
    file = _file(url)
    return "cloud" if file is None else _keys(url, file)


def for_obstore(url: str) -> dict[str, Any]:
    """Return `config`, and perhaps `credential_provider`, of obstore's GCSStore; StorageError with none."""
    if names := others():
        raise StorageError(f"{names[0]} would open {url} in place of {SAYS}: unset it, or pip install 'everstep[gcs]'")
    if _open():
        # Before a write, obstore 0.12 requests a token from the metadata address even with skip_signature.
        return {"config": {"skip_signature": True}, "credential_provider": _nobody}
    file = _file(url)
    if file is None:
        return {"config": {}}
    if _kind(url, file) in READ_BY_OBSTORE:
        return {"config": {"application_credentials": file}}
    return {"config": {}, "credential_provider": partial(_token, _keys(url, file))}


def _open() -> bool:
    return bool(os.environ.get(EMULATOR)) or credentials.anonymous("GOOGLE")


def _file(url: str) -> str | None:
    """Return the key file; None without one when the role of the machine is selected; else StorageError."""
    named = os.environ.get(SAYS)
    gcloud = os.environ.get("CLOUDSDK_CONFIG", os.path.expanduser("~/.config/gcloud"))
    file = named or f"{gcloud}/application_default_credentials.json"
    if Path(file).is_file():
        return file
    if named:
        raise StorageError(f"no credentials for {url}: {SAYS}={named} is no file")
    if credentials.by_instance_role():
        return None
    raise credentials.missing(url, SAYS)


def _kind(url: str, file: str) -> str:
    try:
        return str(json.loads(Path(file).read_bytes())["type"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"cannot open {url}: {file} is no file of Google's keys ({error!r})") from error


def _keys(url: str, file: str) -> Any:
    """Return google-auth's credentials from a file."""
    _kind(url, file)
    try:
        import google.auth
        import google.auth.credentials
        import google.auth.exceptions
    except ImportError as error:
        raise StorageError(f"cannot read {file} for {url}: pip install 'everstep[gcs]'") from error
    load: Any = google.auth.load_credentials_from_file
    scoped: Any = google.auth.credentials.with_scopes_if_required
    try:
        # Given scopes at once, google-auth would request the project of a federated identity, and wait for it.
        return scoped(load(file)[0], [SCOPE])
    except google.auth.exceptions.GoogleAuthError as error:
        raise StorageError(f"cannot open {url}: {' '.join(str(error).split())}") from error


def _token(keys: Any) -> dict[str, Any]:
    """Return the current token, in obstore's terms."""
    from google.auth.transport.requests import Request

    if not keys.valid:
        keys.refresh(partial(Request(), timeout=QUIET_S))
    return {"token": keys.token, "expires_at": keys.expiry and keys.expiry.replace(tzinfo=UTC)}


def _nobody() -> dict[str, Any]:
    return {"token": "", "expires_at": None}
