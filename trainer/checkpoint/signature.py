"""Signature of a manifest, and so of every byte of a checkpoint. This module imports no torch.

With a key (everstep/security/signing.py) every manifest is signed, and a manifest that was not signed with the same key
for the same run is not read.

A signature is SCHEME:RUN:CONFIG:ALGORITHM:VALUE. Its value signs the manifest with the first three in this field. So
the format of manifests is that of unsigned ones, and a checkpoint is bound to its run and to the config that is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

from everstep.security.signing import KEY, configured_key, is_on

SCHEME = "v2"


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


def sign(text: bytes, bound: str) -> str:
    """Return the signature of a text that holds `bound`; an empty string if there is no key."""
    if not is_on():
        return ""
    key = configured_key()
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
    parts, key = signature.split(":"), configured_key()
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
