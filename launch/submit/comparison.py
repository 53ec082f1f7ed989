"""Comparison of two runs: config, code, data, packages and figures, from their folders alone."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.config.dotted import leaves
from everstep.errors import EverstepError
from everstep.frozen_config import plain, thaw
from everstep.launch.submit.snapshot import unpack
from everstep.run_folder import CONFIG, DATA, METRICS, PROVENANCE, SUBMISSIONS, RunFolder

SAME = ("run", "run_root")
"""Keys that say where a run is, and not what it does."""
LARGEST_FILE = 1 << 20
"""Bytes of a file of a snapshot whose lines are compared."""
MISSING = "(none)"


@dataclass(frozen=True)
class Facts:
    """Contents of one run folder, as far as they are compared."""

    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    data: Mapping[str, Any]
    code: Mapping[str, str]
    """Path → text of each file of the snapshot; of a run without one, commit and uncommitted changes."""
    figures: Mapping[str, float]


def facts(folder: RunFolder) -> Facts:
    config = thaw(folder.storage.read(CONFIG))
    keys = {key: value for key, value in leaves(plain(config)) if key not in SAME}
    provenance = folder.facts(PROVENANCE)
    reached = dict(figures(folder, config.evaluate.metric, config.evaluate.goal.value))
    return Facts(keys, provenance, folder.facts(DATA), _code(folder, provenance), reached)


def compare(a: Facts, b: Facts) -> dict[str, Any]:
    """Return all that differs, each part as name → [value of A, value of B]; the code as lines of a diff."""
    packages = (dict(each.provenance.get("packages") or {}) for each in (a, b))
    return {
        "config": different(a.config, b.config),
        "code": list(_diff(a.code, b.code)),
        "data": different(dict(leaves(a.data)), dict(leaves(b.data))),
        "packages": different(*packages),
        "python": different(*({"python": each.provenance.get("python")} for each in (a, b))),
        "figures": {name: [a.figures.get(name), b.figures.get(name)] for name in sorted({*a.figures, *b.figures})},
    }


def different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys whose values differ; a key that is absent has the value MISSING."""
    keys = sorted({*a, *b})
    return {
        key: [a.get(key, MISSING), b.get(key, MISSING)]
        for key in keys
        if json.dumps(a.get(key, MISSING), default=str) != json.dumps(b.get(key, MISSING), default=str)
    }


def figures(folder: RunFolder, metric: str, goal: str) -> Iterator[tuple[str, float]]:
    """Yield the last training figures, the last held-out ones, and the best of the run's metric."""
    train: dict[int, Mapping[str, Any]] = {}
    held_out: dict[int, Mapping[str, Any]] = {}
    for attempt in folder.attempts():
        for record in folder.lines(attempt, METRICS):
            kept = {"train": train, "evaluate": held_out}.get(str(record.get("kind")))
            if kept is not None and isinstance(record.get("step"), int):
                kept[record["step"]] = record
    if train:
        last = train[max(train)]
        yield "step", last["step"]
        yield from ((f"train/{name}", last[name]) for name in ("loss", "items_per_s", "mfu") if name in last)
    if held_out:
        last = held_out[max(held_out)]
        numbers = {name: value for name, value in last.items() if isinstance(value, int | float)}
        yield from ((f"evaluate/{name}", value) for name, value in numbers.items() if name not in ("step", "time"))
        values = [(each[metric], step) for step, each in held_out.items() if metric in each]
        if values:
            best, at = (min if goal == "min" else max)(values)
            yield f"best/{metric}", best
            yield "best/step", at


def _code(folder: RunFolder, provenance: Mapping[str, Any]) -> dict[str, str]:
    if (digest := _snapshot(folder)) is not None:
        with tempfile.TemporaryDirectory() as into:
            unpacked = unpack(folder, digest, Path(into))
            files = sorted(path for path in unpacked.rglob("*") if path.is_file() and not path.is_symlink())
            return {str(path.relative_to(unpacked)): _text(path) for path in files}
    code = provenance.get("code") or {}
    changed = code.get("diff") or (f"sha256 {code['diff_sha256']}\n" if code.get("changed") else "")
    return {"(commit)": f"{code.get('commit', MISSING)}\n", "(uncommitted changes)": str(changed)}


def _snapshot(folder: RunFolder) -> str | None:
    """Return the digest of the code of the newest submission; None for a run that was started by hand."""
    for name in sorted(folder.storage.names(SUBMISSIONS), reverse=True):
        if name.count(".") == 1 and (place := folder.facts(f"{SUBMISSIONS}/{name}").get("code")):
            return str(place).split("/")[0]
    return None


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if len(data) <= LARGEST_FILE:
            return data.decode()
    except UnicodeDecodeError:
        pass
    import hashlib

    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}\n"


def _diff(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*a, *b}):
        before, after = a.get(name, "").splitlines(), b.get(name, "").splitlines()
        yield from difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", lineterm="")


def readable(folder: RunFolder) -> Facts:
    """Return the facts of a run; EverstepError with its name if its folder cannot be read."""
    try:
        return facts(folder)
    except FileNotFoundError as error:
        raise EverstepError(f"{folder.url} has no {CONFIG}: no run was composed there") from error
