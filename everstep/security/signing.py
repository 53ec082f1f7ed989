"""Signing keys, and signatures of what leaves a run: exports, records of a registry, evidence.

The key is EVERSTEP_SIGNING_KEY in the environment and is never written to a file. It is any text, for keyed BLAKE3, or
`ed25519:` and 64 hex digits; `ed25519-public:` and the other half only verifies.

A signature is PURPOSE:ALGORITHM:VALUE. Its value signs the purpose, the place and the bytes, so that a signature of
one kind or place is of no use for another.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from typing import Any, Protocol

from blake3 import blake3

from everstep.errors import ConfigError

KEY = "EVERSTEP_SIGNING_KEY"
CONTEXT = "everstep 2026-11 signature of a checkpoint's manifest"
PRIVATE, PUBLIC = "ed25519:", "ed25519-public:"
EXPORT, REGISTRY, EVIDENCE = "export-1", "registry-1", "evidence-1"
"""Purposes of signatures."""
LONGEST = 1024
"""Characters of a signature's file."""


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
    """True if a signing key is set, so that what can be signed must be."""
    return bool(os.environ.get(KEY))


def configured_key() -> SigningKey:
    """Return the key of the environment; ConfigError if its text is none."""
    said = os.environ[KEY]
    if not said.startswith((PRIVATE, PUBLIC)):
        return Blake3Key(said)
    try:
        return Ed25519Key(said)
    except ImportError as error:
        raise ConfigError(f"{KEY} of ed25519 needs cryptography: pip install 'everstep[signing]'") from error
    except ValueError as error:
        raise ConfigError(f"{KEY} is no key of ed25519: write {PRIVATE} and 64 hex digits") from error


def check_signer() -> None:
    """Raise ConfigError if a key is set that cannot sign, before work is done in vain."""
    sign(EXPORT, "", b"")


def sign(purpose: str, place: str, data: bytes) -> str:
    """Return the signature of bytes; an empty string if there is no key."""
    if not is_on():
        return ""
    key = configured_key()
    return f"{purpose}:{key.algorithm}:{key.sign(_signed(purpose, place, data))}"


class Trust:
    """Keys that verify: public ones of the caller, else the environment's; without any, all is trusted.

    Args:
        public: texts `ed25519-public:` and 64 hex digits; then the environment's key is not read.

    Raises:
        ConfigError: one of them is no public key.
    """

    def __init__(self, public: str | Sequence[str] | None = None) -> None:
        said = [public] if isinstance(public, str) else public
        if said is not None and not said:
            raise ConfigError("trusted=[]: no key at all trusts nothing; give a public key, or leave it out")
        self.name = KEY if said is None else "trusted"
        if said is None:
            self._keys = [configured_key()] if is_on() else []
        else:
            self._keys = [_public(number, text) for number, text in enumerate(said)]

    @property
    def is_on(self) -> bool:
        """True if signatures are asked for."""
        return bool(self._keys)

    def fault(self, purpose: str, place: str, data: bytes, signature: str) -> str:
        """Return the reason why bytes may not be trusted; an empty string if they may, or without a key."""
        if not self._keys:
            return ""
        if not signature:
            return f"it is not signed, and {self.name} asks for signatures"
        said, _, rest = signature.partition(":")
        algorithm, _, value = rest.partition(":")
        signed = _signed(purpose, place, data)
        if said == purpose and any(key.algorithm == algorithm and key.verifies(signed, value) for key in self._keys):
            return ""
        return f"it was changed, is of another place, or was signed with a key that {self.name} does not hold"


def _signed(purpose: str, place: str, data: bytes) -> bytes:
    return f"everstep {purpose}\0{place}\0".encode() + data


def _public(number: int, text: str) -> SigningKey:
    """Return a public key; a private one is refused, and not shown."""
    said = f"trusted[{number}]: no public key of ed25519 (write {PUBLIC} and 64 hex digits)"
    if not isinstance(text, str) or not text.startswith(PUBLIC):
        raise ConfigError(f"{said}; a private or secret key stays where it signs")
    try:
        return Ed25519Key(text)
    except ImportError as error:
        raise ConfigError(f"trusted[{number}]: ed25519 needs cryptography: pip install 'everstep[signing]'") from error
    except ValueError as error:
        raise ConfigError(said) from error
