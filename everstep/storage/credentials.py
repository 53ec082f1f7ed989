"""Credentials of stores: from the environment, and never implicitly from a cloud's metadata address.

An address that answers on every machine of a cloud hides mistakes: on a laptop a missing key costs a minute of waiting,
on a server the job runs under a wrong identity. EVERSTEP_INSTANCE_ROLE=1 selects the machine's own role.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

from everstep.errors import StorageError

INSTANCE_ROLE = "EVERSTEP_INSTANCE_ROLE"
SAME = (("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss"))
"""Protocols of the same store in fsspec, which reads the settings of each for all."""
FRESH_S = 300.0
"""Seconds for which keys of a profile are used before botocore, which renews them, is queried again."""
S3_SAYS = (
    "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_WEB_IDENTITY_TOKEN_FILE with AWS_ROLE_ARN, or "
    "AWS_CONTAINER_CREDENTIALS_FULL_URI"
)
AZURE_SAYS = (
    "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, or AZURE_CLIENT_ID with AZURE_TENANT_ID and AZURE_CLIENT_SECRET or "
    "AZURE_FEDERATED_TOKEN_FILE"
)


def by_instance_role() -> bool:
    """True if the user selects the role of the machine, from its metadata address."""
    return os.environ.get(INSTANCE_ROLE, "") not in ("", "0")


def told_to_fsspec(protocol: str) -> bool:
    """True if fsspec has its own settings for a protocol, which only fsspec can read."""
    folder = os.environ.get("FSSPEC_CONFIG_DIR", os.path.expanduser("~/.config/fsspec"))
    names = next((names for names in SAME if protocol in names), (protocol,))
    settings = tuple(f"FSSPEC_{name.upper()}" for name in names)
    return any(name.startswith(settings) for name in os.environ) or os.path.isdir(folder)


def missing(url: str, names: str) -> StorageError:
    return StorageError(f"no credentials for {url}: set {names}; {INSTANCE_ROLE}=1 uses the role of the machine")


def anonymous(cloud: str) -> bool:
    """True if AWS_, AZURE_ or GOOGLE_SKIP_SIGNATURE declares the buckets public."""
    return os.environ.get(f"{cloud}_SKIP_SIGNATURE", "").lower() in ("1", "true")


def s3_profile(url: str) -> Any | None:
    """Return botocore's credentials from a file; None if variables suffice. StorageError with none."""
    if by_instance_role() or anonymous("AWS"):
        return None
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # profile files may also point to the metadata address
    if _set("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") or _set("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        return None
    if _set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") or _set("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        return None
    files = (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config"))
    if not any(os.path.exists(os.path.expanduser(os.environ.get(name, usual))) for name, usual in files):
        raise missing(url, S3_SAYS)
    return _from_files(url)


def _from_files(url: str) -> Any:
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        raise StorageError(f"cannot read AWS profiles for {url}: pip install 'everstep[s3]'") from error
    try:
        found = botocore.session.Session().get_credentials()
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"no credentials for {url}: {error}") from error
    if found is None:
        raise missing(url, S3_SAYS)
    return found


def s3_keys(profile: Any) -> dict[str, Any]:
    """Return the current keys of a profile, in obstore's terms."""
    keys = profile.get_frozen_credentials()
    until = datetime.now(UTC) + timedelta(seconds=FRESH_S)
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.token,
        "expires_at": until,
    }


def azure(url: str, account: str | None) -> dict[str, str]:
    """Return account_name and credentials in obstore's terms; StorageError with none.

    Args:
        account: the account in the URL.
    """
    said = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    if said:
        return _connection(said)
    name = account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not name:
        raise missing(url, AZURE_SAYS)
    found = {"account_name": name}
    if key := os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"):
        return {**found, "account_key": key}
    if token := os.environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return {**found, "sas_key": token}
    if by_instance_role() or anonymous("AZURE"):
        return found
    prefix = "AZURE_STORAGE_" if _set("AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_TENANT_ID") else "AZURE_"
    if not _set(f"{prefix}CLIENT_ID", f"{prefix}TENANT_ID"):
        raise missing(url, AZURE_SAYS)
    found |= {"client_id": os.environ[f"{prefix}CLIENT_ID"], "tenant_id": os.environ[f"{prefix}TENANT_ID"]}
    if secret := os.environ.get(f"{prefix}CLIENT_SECRET"):
        return {**found, "client_secret": secret}
    if file := os.environ.get("AZURE_FEDERATED_TOKEN_FILE"):
        return {**found, "federated_token_file": file}
    raise missing(url, AZURE_SAYS)


def _connection(text: str) -> dict[str, str]:
    """Return a connection string in obstore's terms, without the entries that obstore does not support."""
    words = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "SharedAccessSignature": "sas_key",
        "BlobEndpoint": "endpoint",
    }
    pairs = (item.split("=", 1) for item in text.strip().split(";") if "=" in item)
    return {words[name]: value for name, value in pairs if name in words}


def _set(*names: str) -> bool:
    return all(os.environ.get(name) for name in names)
