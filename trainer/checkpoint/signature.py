"""Signature of a manifest, and so of every byte of a checkpoint. This module imports no torch.

With EVERSTEP_SIGNING_KEY in the environment every manifest is signed, and a manifest that was not signed with the same
key for the same run is not read. The key itself is never written to a file. It is any text, for keyed BLAKE3, or
`ed25519:` and 64 hex digits; `ed25519-public:` and the other half only reads.

A signature is SCHEME:RUN:CONFIG:ALGORITHM:VALUE. Its value signs the manifest with the first three in this field. So
the format of manifests is that of unsigned ones, and a checkpoint is bound to its run and to the config that is fixed.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from typing import Any, Protocol

from blake3 import blake3

from everstep.errors import ConfigError

KEY = "EVERSTEP_SIGNING_KEY"
CONTEXT = "everstep 2026-11 signature of a checkpoint's manifest"
SCHEME = "v2"
PRIVATE, PUBLIC = "ed25519:", "ed25519-public:"


@dataclass(frozen=True)
class Binding:
    """The run that a signature is for, and the part of its config that is fixed."""

    run: str = "-"
    config: str = "-"
    may_differ: bool = False
    """True if the run's `resume.allow` lets its user change more of the config."""

    def __str__(self) -> str:
        return f"{SCHEME}:{self.run}:{self.config}"


UNBOUND = Binding()


class SigningKey(Protocol):
    """A key of one algorithm."""

    algorithm: str

    def sign(self, text: bytes) -> str: ...
    def verifies(self, text: bytes, signature: str) -> bool: ...


class Blake3Key:
    """A secret text that signs and verifies."""

    algorithm = "blake3"

    def __init__(self, secret: str) -> None:
        self._key = blake3(secret.encode(), derive_key_context=CONTEXT).digest()

    def sign(self, text: bytes) -> str:
        return blake3(text, key=self._key).hexdigest()

    def verifies(self, text: bytes, signature: str) -> bool:
        return hmac.compare_digest(signature.encode(), self.sign(text).encode())


class Ed25519Key:
    """A key whose public half verifies what the private one has signed."""

    algorithm = "ed25519"

    def __init__(self, text: str) -> None:
        from cryptography.hazmat.primitives.asymmetric import ed25519

        self._private: Any = None
        if text.startswith(PUBLIC):
            self._public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.removeprefix(PUBLIC)))
        else:
            self._private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.removeprefix(PRIVATE)))
            self._public = self._private.public_key()

    def sign(self, text: bytes) -> str:
        if self._private is None:
            raise ConfigError(f"{KEY} is a public key ({PUBLIC}…): it verifies and cannot sign; set the private one")
        return str(self._private.sign(text).hex())

    def verifies(self, text: bytes, signature: str) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(bytes.fromhex(signature), text)
        except (InvalidSignature, ValueError):
            return False
        return True


def is_on() -> bool:
    """True if a signing key is set, so that checkpoints must be signed."""
    return bool(os.environ.get(KEY))


def _key() -> SigningKey:
    said = os.environ[KEY]
    if not said.startswith((PRIVATE, PUBLIC)):
        return Blake3Key(said)
    try:
        return Ed25519Key(said)
    except ImportError as error:
        raise ConfigError(f"{KEY} of ed25519 needs cryptography: pip install 'everstep[signing]'") from error
    except ValueError as error:
        raise ConfigError(f"{KEY} is no key of ed25519: write {PRIVATE} and 64 hex digits") from error


def sign(text: bytes, bound: str) -> str:
    """Return the signature of a text that holds `bound`; an empty string if there is no key."""
    if not is_on():
        return ""
    key = _key()
    return f"{bound}:{key.algorithm}:{key.sign(text)}"


def bound_part(signature: str) -> str:
    """Return the part of a signature that is signed itself; all of it if it has no value yet."""
    return ":".join(signature.split(":")[:3])


def signature_fault(text: bytes, signature: str) -> str:
    """Return the reason why a text may not be trusted; an empty string if it may, or without a key."""
    if not is_on():
        return ""
    if not signature:
        return f"it is not signed, and {KEY} asks for signatures; unset that to trust it all the same"
    parts, key = signature.split(":"), _key()
    if len(parts) != 5 or parts[0] != SCHEME:
        return f"its signature is of another version, which binds it to no run; unset {KEY} to trust it all the same"
    if parts[3] != key.algorithm or not key.verifies(text, parts[4]):
        return f"it was changed, or signed with another {KEY}"
    return ""


def binding_fault(signature: str, run: str | None, config: str | None = None) -> str:
    """Return the reason why a verified signature is of another run or config; empty if it is not.

    Args:
        run: id of the run; None does not ask.
        config: digest of the fixed config; None does not ask.
    """
    if not is_on():
        return ""
    _, signed_run, signed_config = bound_part(signature).split(":")
    if run is not None and signed_run != run:
        return f"it was signed for another run; unset {KEY} to trust it all the same"
    if config is not None and signed_config != config:
        return "it was signed for another config: config.yaml has changed since in what may not change on a resume"
    return ""
