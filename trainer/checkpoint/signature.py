"""Signature of a manifest, and so of every byte of a checkpoint. This module imports no torch.

With EVERSTEP_SIGNING_KEY in the environment every manifest is signed (keyed BLAKE3), and a manifest that was not signed
with the same key is not read. The key itself is never written to a file.
"""

from __future__ import annotations

import hmac
import os

from blake3 import blake3

KEY = "EVERSTEP_SIGNING_KEY"
CONTEXT = "everstep 2026-11 signature of a checkpoint's manifest"


def sign(text: bytes) -> str:
    """Return the signature; an empty string if there is no key."""
    secret = os.environ.get(KEY)
    if not secret:
        return ""
    key = blake3(secret.encode(), derive_key_context=CONTEXT).digest()
    return blake3(text, key=key).hexdigest()


def signature_fault(text: bytes, signature: str) -> str:
    """Return the reason why a text may not be trusted; an empty string if it may, or without a key."""
    if not os.environ.get(KEY):
        return ""
    if not signature:
        return f"it is not signed, and {KEY} asks for signatures; unset that to trust it all the same"
    if not hmac.compare_digest(signature, sign(text)):
        return f"it was changed, or signed with another {KEY}"
    return ""
