"""Detection of secrets: in names of variables, texts and URLs, and in files for a snapshot."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from everstep.errors import ConfigError

SECRET_WORDS = re.compile(r"KEY(?!BOARD)|TOKEN(?!IZ|S_PER)|SECRET|PASSWORD|PASSWD|CREDENTIAL")
"""Words that count anywhere in a name, except in TOKENIZERS_PARALLELISM and the like."""
SECRET_PARTS = ("PASS", "PGPASS", "PWD", "AUTH", "PAT", "SAS", "DSN", "DATABASE_URL", "CONNECTION_STRING")
"""Words that count only as a whole part of a name: PAT is a secret, PATH is none."""
SECRET_FORMS = re.compile(
    r"""(?x)
    -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?:[\s\S]{0,20000}?-----END\ [A-Z ]*PRIVATE\ KEY-----)?
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[0-9A-Za-z_-]{35}\b
    | \b(?:ghp|gho|ghu|ghs|ghr)_[0-9A-Za-z]{20,} | \bgithub_pat_[0-9A-Za-z_]{20,} | \bglpat-[0-9A-Za-z_-]{16,}
    | \bhf_[0-9A-Za-z]{20,} | \bsk-[0-9A-Za-z_-]{20,} | \bxox[abprs]-[0-9A-Za-z-]{10,} | \bnpm_[0-9A-Za-z]{30,}
    | \beyJ[0-9A-Za-z_-]{10,4000}\.eyJ[0-9A-Za-z_-]{10}
    | \b[a-z][a-z0-9+.-]{0,20}://[^/\s:@'"]{0,200}:[^/\s@'"]{1,1000}@
    | [?&;](?:sig|token|password|secret|x-amz-signature|x-amz-security-token|sharedaccesssignature)=[^&\s'"]+
    | \b(?:AccountKey|SharedAccessKey)=[0-9A-Za-z+/=]{8,}
    """,
    re.IGNORECASE,
)
"""Forms of well-known secrets, and credentials in a URL."""
SECRET_KEYS = re.compile(
    r"(?i)(?:^|_)(?:password|passwd|(?:api|secret|access)_?key|client_?secret|(?:auth|access|api|bearer|hf)_?token)$"
)
"""Keys of a config whose text is a secret.

`token` and `key` alone are none: pad_token, the key of a split.
"""
ASSIGNED = re.compile(r"\b(\w+)=(?=[^\s$'\"]|'[^'$]+'|\"[^\"$]+\")")
"""NAME=VALUE in a line of shell, with a literal value: $(…) and $NAME are none."""
SECRET_FILES = (
    ".env", ".env.*", "*.env", ".netrc", "_netrc", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", ".vault-token",
    ".pgpass", ".my.cnf", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", "kubeconfig*", "*service-account*.json", "*service_account*.json",
    "*credentials", "*credentials.json", "*credentials.y*ml", "*credentials.ini", "*credentials.txt",
    "*credentials.csv", "*credentials.toml", "*gcp-key*.json", "secrets.y*ml", "secrets.json", "secrets.toml",
)  # fmt: skip
EXAMPLE_FILES = ("*.example", "*.sample", "*.template", "*.dist", "*.pub")
"""Files without real values."""
SECRET_FOLDERS = (".aws", ".ssh", ".kube", ".gnupg", ".azure", ".docker", "gcloud")
SCANNED_BYTES = 64 * 1024


def is_secret_name(name: str) -> bool:
    """True for the name of a variable that usually holds a secret."""
    upper = name.upper()
    parts = re.split(r"[^A-Z0-9]+", upper)
    return SECRET_WORDS.search(upper) is not None or any(part in SECRET_PARTS for part in (*parts, upper))


def has_secret(text: str) -> bool:
    """True if a text holds a well-known form of secret, a URL with credentials, or NAME=VALUE of a secret."""
    return SECRET_FORMS.search(text) is not None or any(is_secret_name(found[1]) for found in ASSIGNED.finditer(text))


def without_secrets(text: str) -> str:
    """Return a text with secrets replaced, for a record that is kept."""
    return SECRET_FORMS.sub("(a secret was here)", text)


def is_secret_file(path: str) -> bool:
    """True if a file with this name, or in a folder of this name, usually holds secrets."""
    *folders, name = PurePosixPath(path).parts
    lower = name.lower()
    if any(folder.lower() in SECRET_FOLDERS for folder in folders):
        return True
    return any(fnmatch.fnmatchcase(lower, form) for form in SECRET_FILES) and not any(
        fnmatch.fnmatchcase(lower, form) for form in EXAMPLE_FILES
    )


def holds_secret(data: bytes) -> bool:
    """True if the beginning of a file holds a well-known form of secret."""
    return SECRET_FORMS.search(data[:SCANNED_BYTES].decode("utf-8", "replace")) is not None


def refuse_secrets(value: Any, key: str) -> None:
    """Raise ConfigError if a config holds a secret; the message does not show the value.

    Args:
        value: a text, or lists and mappings of them.
        key: key of the value, for the message.
    """
    if isinstance(value, str) and (
        SECRET_FORMS.search(value) or (value and SECRET_KEYS.search(key.rpartition(".")[2]))
    ):
        raise ConfigError(
            f"{key}=…: the value holds a secret, which the run folder would show to all its readers; "
            "give it in the environment (for a job by its name in job.secrets)"
        )
    below = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, each in below:
        refuse_secrets(each, f"{key}.{name}" if key else str(name))
