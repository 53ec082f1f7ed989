"""Signed head of a run: a record of the newest checkpoint, which shows if that was removed.

A run folder that was put back as a whole, with an older head, is not detected: only a record elsewhere could show it.
"""

from __future__ import annotations

import json

from everstep.checked_json import mapping, parse, text, whole
from everstep.run_folder import CHECKPOINTS, RunFolder
from everstep.security.signing import is_on
from everstep.trainer.checkpoint.manifest import folders
from everstep.trainer.checkpoint.manifest_fields import LONGEST_SIGNATURE
from everstep.trainer.checkpoint.signature import Binding, bound_part, sign, signature_fault

HEAD = f"{CHECKPOINTS}/head.json"


def write_head(run: RunFolder, binding: Binding, step: int, attempt: int) -> None:
    """Record the newest checkpoint, after its commit; nothing without a key."""
    if is_on():
        signature = sign(_signed(str(binding), step, attempt), str(binding))
        run.storage.write(HEAD, json.dumps({"step": step, "attempt": attempt, "signature": signature}).encode())


def _signed(bound: str, step: int, attempt: int) -> bytes:
    return f"head {bound} {step} {attempt}".encode()


def head_fault(run: RunFolder, binding: Binding) -> str:
    """Return the reason to doubt that no newer checkpoint was saved; empty if there is none, or no key."""
    if not is_on():
        return ""
    there = {(step, attempt) for step, attempt, _ in folders(run)}
    try:
        head = mapping(parse(run.storage.read(HEAD)), "it")
        step, attempt = whole(head.get("step"), "step"), whole(head.get("attempt"), "attempt")
        signature = text(head.get("signature"), "signature", LONGEST_SIGNATURE)
    except FileNotFoundError:
        return f"{HEAD} is missing: newer ones may have been removed" if there else ""
    except ValueError as error:
        return f"{HEAD} is damaged: {error}"
    bound = bound_part(signature)
    if bound.split(":")[1:2] != [binding.run] or signature_fault(_signed(bound, step, attempt), signature):
        return f"{HEAD} was changed, or signed for another run: newer ones may have been removed"
    if step and (step, attempt) not in there:
        return f"step {step} of attempt {attempt} was saved after it, and is gone"
    return ""
