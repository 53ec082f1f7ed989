"""Comparison of checkpoint B with that of a replay: every tensor, progress and all other state."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import torch
from blake3 import blake3

from everstep.run_folder import REPLAYS, RunFolder
from everstep.storage import Storage
from everstep.trainer.checkpoint.manifest import Committed, Manifest, candidates, parse_checkpoint, read_manifest
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole
from everstep.trainer.checkpoint.tools.diff import Difference, differences
from everstep.trainer.code_record import MODULES, code_changes
from everstep.trainer.replay.plan import Plan

OF_EVALUATION = ("evaluated", "metric", "best", "best_step", "stale")
"""Parts of the progress that an evaluation writes; a replay always evaluates at its end."""
SHOWN = 8
"""Problems that a line lists."""


def result_of(run: RunFolder, scratch: RunFolder, plan: Plan, code: int | None) -> dict[str, Any]:
    """Return the result of a replay.

    Args:
        code: exit code of its training; None if it was not started.
    """
    facts: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": run.url,
        "from": {"checkpoint": plan.first, "manifest": plan.first_manifest},
        "to": {"checkpoint": plan.last, "manifest": plan.last_manifest},
        "world": {"then": plan.world, "now": None},
        "problems": list(plan.problems),
        "equal": False,
    }
    made = next((each for each in candidates(scratch) if each.step == plan.step), None) if code == 0 else None
    if isinstance(made, Committed):
        facts |= _compared(run, scratch, plan, made)
    elif code is not None:
        facts["problems"].append(f"the replay made no checkpoint of step {plan.step} (exit code {code}); see above")
    facts["proved"] = facts["equal"] and not facts["problems"]
    return facts


def _compared(run: RunFolder, scratch: RunFolder, plan: Plan, made: Committed) -> dict[str, Any]:
    name = plan.last.rpartition("/")[2].split("-")
    read = parse_checkpoint(plan.last, int(name[1]), int(name[3]), read_manifest(run.storage, plan.last), None)
    then = read.manifest if isinstance(read, Committed) else made.manifest
    apart = list(differences((run, plan.last), (scratch, made.path)))
    other = [*_other_state(then, made.manifest)]
    largest = max(apart, key=lambda each: each.largest or 0.0, default=None)
    changed = _code_problems(run, scratch, plan.attempt, made.attempt)
    problems = changed + _problems(apart, other, largest, plan.world, made.manifest.world)
    return {
        "world": {"then": plan.world, "now": made.manifest.world},
        "equal": not apart and not other,
        "problems": problems,
        "tensors": tensor_digests(run.storage, plan.last),
        "differing": [each.name for each in apart],
        "largest": None if largest is None else {"tensor": largest.name, "difference": largest.largest},
    }


def tensor_digests(storage: Storage, path: str) -> dict[str, str]:
    """Return the BLAKE3 of the bytes of every tensor of a checkpoint, by name."""
    metadata, found = read_metadata(storage, path), {}
    for name in sorted(metadata.state_dict_metadata):
        content = read_whole(storage, path, metadata, name).contiguous().reshape(-1).view(torch.uint8).numpy()
        found[name] = blake3(content.data).hexdigest()
    return found


def _other_state(then: Manifest, now: Manifest) -> list[str]:
    """Return the parts of the state that are no tensors and differ."""
    evaluated = then.progress["evaluated"] == then.step
    kept = [key for key in then.progress if evaluated or key not in OF_EVALUATION]
    found = [f"progress.{key}" for key in kept if _text(then.progress[key]) != _text(now.progress.get(key))]
    keys = sorted(then.values.keys() | now.values.keys())
    return found + [f"values.{key}" for key in keys if _text(then.values.get(key)) != _text(now.values.get(key))]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _problems(apart: list[Difference], other: list[str], largest: Difference | None, then: int, now: int) -> list[str]:
    """Return what differs, a line each: the tensors with the largest difference, and the other state."""
    found = [f"other state differs: {', '.join(other[:SHOWN])}"] if other else []
    if largest is not None:
        size = f"the largest difference is {largest.largest:.3g} in {largest.name}" if largest.largest else largest.what
        line = f"{len(apart)} tensors are not equal to the last bit; {size}"
        if then != now:
            line += f"; {now} processes in place of {then}, so this is no evidence to the last bit"
        found.append(line)
    return found


def _code_problems(run: RunFolder, scratch: RunFolder, then: int, now: int) -> list[str]:
    """Return how the code that was loaded now differs from that of the attempt that wrote B."""
    before, after = (folder.facts(folder.attempt(number, MODULES)) for folder, number in ((run, then), (scratch, now)))
    if not before:
        return [f"code: attempt {then} has recorded none ({run.attempt(then, MODULES)})"]
    return [f"code: {line}" for line in code_changes(before, after)]


def write_result(run: RunFolder, facts: Mapping[str, Any]) -> str:
    """Write the result as the next of the run's replays; return its path there."""
    text = (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()
    number = len(run.storage.names(REPLAYS)) + 1
    while not run.storage.create(path := f"{REPLAYS}/{number:04d}.json", text):
        number += 1
    return path
