"""Records of a run that belong to its evidence, without secrets, and a summary of them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from typing import Any

from blake3 import blake3

from everstep import __version__
from everstep.checked_json import mapping, parse
from everstep.errors import ConfigError, printable
from everstep.run_folder import (
    ATTEMPTS,
    CHECKPOINTS,
    CODE,
    CONFIG,
    DATA,
    EVALUATIONS,
    EXCLUSIONS,
    JOB,
    PROVENANCE,
    REPLAYS,
    RESTARTS,
    RESULT,
    RUN_ID,
    SUBMISSIONS,
    RunFolder,
)
from everstep.security.secret_detection import without_secrets
from everstep.storage import read_limited

LARGEST = 256 << 20
"""Bytes of a record, which is that of the largest manifest."""
ROOT = (CONFIG, RUN_ID, JOB, PROVENANCE, DATA)
FLAT = (REPLAYS, EXCLUSIONS, RESTARTS, SUBMISSIONS)
"""Folders of JSON files."""
NESTED = {
    ATTEMPTS: ("claim.json", "restored.json", "outcome.json", "code.json", CONFIG, "events*.jsonl"),
    CHECKPOINTS: ("manifest*.json",),
    EVALUATIONS: (CONFIG, RESULT),
}
"""Folders of folders, with patterns of the files that are taken from each."""


def records(run: RunFolder) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield path, content as stored, and content without secrets of each record, sorted by path.

    Raises:
        ConfigError: the folder holds no run, or a record is larger than any that Everstep writes.
    """
    if not run.storage.exists(CONFIG):
        raise ConfigError(f"{run.url} has no {CONFIG}: it holds no run")
    for path in sorted(_paths(run)):
        try:
            stored = read_limited(run.storage, path, LARGEST)
        except FileNotFoundError:  # retention has just removed it
            continue
        except ValueError as error:
            raise ConfigError(f"{run.url}: {error}; it is no record of Everstep") from error
        yield path, stored, without_secrets(stored.decode(errors="replace")).encode() if stored else stored


def _paths(run: RunFolder) -> Iterator[str]:
    here = set(run.storage.names())
    yield from (name for name in ROOT if name in here)
    for folder in FLAT:
        yield from (f"{folder}/{name}" for name in run.storage.names(folder) if name.endswith(".json"))
    for folder, patterns in NESTED.items():
        for entry in run.storage.names(folder):
            names = run.storage.names(f"{folder}/{entry}")
            yield from (
                f"{folder}/{entry}/{name}"
                for name in names
                if any(fnmatch.fnmatchcase(name, each) for each in patterns)
            )


def summary(run: RunFolder, found: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what an auditor reads first, from the records alone."""
    provenance, data = _json(found.get(PROVENANCE)), _json(found.get(DATA))
    code = provenance.get("code") or {}
    return {
        "everstep": __version__,
        "run": run.url.rstrip("/").rpartition("/")[2],
        "run_id": found.get(RUN_ID, b"").decode(errors="replace").strip(),
        "started": {key: provenance.get(key) for key in ("time", "user", "host", "everstep", "python", "platform")},
        "code": {
            "commit": code.get("commit") if isinstance(code, dict) else None,
            "changed": code.get("changed") if isinstance(code, dict) else None,
            "snapshots": sorted(run.storage.names(CODE)),
        },
        "data": [
            {key: source.get(key) for key in ("place", "digest", "share", "tags")}
            for source in data.get("sources", [])
            if isinstance(source, dict)
        ],
        "checkpoints": _checkpoints(found),
        "attempts": _attempts(found),
        "evaluations": [path for path in found if path.startswith(f"{EVALUATIONS}/") and path.endswith(RESULT)],
        "exclusions": [path for path in found if path.startswith(f"{EXCLUSIONS}/")],
        "replays": [
            {"file": path, **{key: _json(found[path]).get(key) for key in ("from", "to", "proved", "problems")}}
            for path in found
            if path.startswith(f"{REPLAYS}/")
        ],
    }


def _checkpoints(found: Mapping[str, bytes]) -> list[dict[str, Any]]:
    keys = ("step", "attempt", "world", "config_digest", "data_digest", "metric")
    paths = [path for path in found if path.startswith(f"{CHECKPOINTS}/")]
    return [
        {"manifest": path, "blake3": blake3(found[path]).hexdigest(), **{k: _json(found[path]).get(k) for k in keys}}
        for path in paths
    ]


def _attempts(found: Mapping[str, bytes]) -> list[dict[str, Any]]:
    listed = []
    for number in sorted({path.split("/")[1] for path in found if path.startswith(f"{ATTEMPTS}/")}):
        claim, ended, restored = (
            _json(found.get(f"{ATTEMPTS}/{number}/{name}.json")) for name in ("claim", "outcome", "restored")
        )
        listed.append(
            {
                "attempt": number,
                "host": claim.get("host"),
                "world": claim.get("world"),
                "time": claim.get("time"),
                "from_step": restored.get("step"),
                "outcome": ended.get("outcome", "no outcome recorded"),
                "step": ended.get("step"),
            }
        )
    return listed


def _json(content: bytes | None) -> dict[str, Any]:
    """Return an object; empty if it is missing or damaged, as the file itself is in the archive."""
    try:
        return mapping(parse(content), "it") if content else {}
    except ValueError:
        return {}


def card(facts: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [f"# Evidence of run {facts['run']}", "", "`index.json` has size and BLAKE3 of each file.", "", "## Origin"]
    lines += ["", *(f"- {name}: {value}" for name, value in facts["started"].items())]
    lines += [f"- commit: {facts['code']['commit'] or 'unknown'}, with changes: {facts['code']['changed']}"]
    lines += ["", "## Data", "", *(f"- {_source(source)}" for source in facts["data"])]
    lines += ["", "## Attempts", ""]
    lines += [f"- {a['attempt']}: from step {a['from_step']}, {a['outcome']} at {a['step']}" for a in facts["attempts"]]
    lines += ["", "## Checkpoints", ""]
    lines += [f"- step {c['step']}, world {c['world']}: `{c['manifest']}`, {c['blake3']}" for c in facts["checkpoints"]]
    lines += ["", "## Results", "", *(f"- {path}" for path in [*facts["evaluations"], *facts["exclusions"]])]
    lines += [f"- {r['file']}: {'proved' if r['proved'] else 'not proved'}" for r in facts["replays"]]
    return "\n".join(printable(line) for line in lines) + "\n"


def _source(source: Mapping[str, Any]) -> str:
    tags = ", ".join(f"{name}:{value}" for name, value in (source["tags"] or {}).items()) or "no tags"
    return f"{source['place']}, digest {source['digest']}, share {source['share']}, {tags}"


def as_text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
