"""Model card of an export, from recorded facts alone; all else is said to be unknown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from everstep.checked_json import mapping, parse
from everstep.errors import DataError, printable
from everstep.frozen_config import plain, thaw
from everstep.run_folder import CONFIG, EVALUATIONS, PROVENANCE, RESULT, RunFolder
from everstep.storage import read_limited
from everstep.trainer.build import digest_of
from everstep.trainer.data.dataset import Splits
from everstep.trainer.data.ordering.data_record import read_record
from everstep.trainer.inference.session import Session

LARGEST = 16 << 20
UNKNOWN = "unknown"


def card(session: Session, splits: Splits | None, facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with a front matter as Hugging Face reads it."""
    run = session.run
    tags = _tags(session)
    head = ["---", "library_name: pytorch", f"license: {UNKNOWN}", "tags: [everstep]", "---", ""]
    lines = [
        *head,
        f"# {run.run}",
        "",
        f"Weights after step {session.step} of a run of Everstep, written as {facts['format']} (`{facts['file']}`).",
        "",
        *_table("Model", _model(session, facts)),
        *_table("Data", _data(session, splits) | _tagged(tags)),
        *_metrics(session),
        *_table("Export", {"check": facts["summary"], "torch": facts["torch"], **_cast(facts)}),
        *_table("Origin", _origin(session)),
        "## Not recorded",
        "",
        f"Licence of the model, intended use, limits{_untagged(tags)}: unknown to Everstep. "
        "Write them here before you publish.",
        "",
        "## Config",
        "",
        "```json",
        json.dumps(plain(run), indent=2, default=str),
        "```",
    ]
    return "\n".join(printable(line) for line in lines) + "\n"


def _model(session: Session, facts: Mapping[str, Any]) -> dict[str, object]:
    run = session.run
    return {
        "task": (run.task or {}).get("_target_", UNKNOWN),
        "model": (run.model or {}).get("_target_", "made by the task"),
        "parameters": f"{facts['parameters']:,}",
        "weights": "moving average (ema)" if facts["weights"] == "ema" else "as trained",
        "initial weights": run.init_from or f"random, seed {run.seed}",
    }


def _data(session: Session, splits: Splits | None) -> dict[str, object]:
    progress, run = session.state.progress, session.run
    facts: dict[str, object] = {"digest": session.data_digest}
    if splits is not None and digest_of(splits) == session.data_digest:
        held_out = ", ".join(f"{name} {len(each):,}".strip() for name, each in splits.held_out().items())
        source = (run.data or {}).get("_target_", UNKNOWN)
        facts |= {
            "source": source,
            "training samples": f"{len(splits.train):,}",
            "held-out samples": held_out or "none",
        }
    elif splits is not None:
        facts["note"] = "the export was checked on other data than that of training"
    return {**facts, "samples seen": f"{progress.step * run.global_batch:,}"}


def _tags(session: Session) -> dict[str, Mapping[str, str]]:
    """Return the tags of each dataset that the run has recorded, by its path."""
    try:
        return {record.place: record.tags for record in read_record(_folder(session))}
    except DataError:  # the model is exported all the same
        return {}


def _tagged(tags: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
    """Return a row for each tag, with the values of all datasets that have it."""
    names = dict.fromkeys(name for found in tags.values() for name in found)
    return {
        f"{name} of the data": "; ".join(
            dict.fromkeys(found.get(name, f"{UNKNOWN} ({place})") for place, found in tags.items())
        )
        for name in names
    }


def _untagged(tags: Mapping[str, Mapping[str, str]]) -> str:
    """Return which facts of the data are not recorded, to append to a list."""
    lacking = [name for name in ("source", "license") if not tags or any(name not in found for found in tags.values())]
    return f", and the {' and '.join(lacking)} of some data" if lacking else ""


def _metrics(session: Session) -> list[str]:
    """Return tables of all evaluations of this checkpoint that the run folder holds."""
    lines: list[str] = []
    for found in _newest(_evaluations(session)):
        try:
            lines += _evaluation(found)
        except (TypeError, ValueError, LookupError, AttributeError):  # a file from elsewhere
            lines += ["", "An evaluation in the run folder cannot be read."]
    progress, recorded = session.state.progress, thaw(_folder(session).storage.read(CONFIG))
    same = recorded.evaluate.weights is session.run.evaluate.weights
    if not lines and same and progress.metric is not None and progress.evaluated == progress.step:
        lines = ["", f"{session.run.evaluate.metric} {progress.metric:.5g} on held-out data, as training measured it."]
    lines = lines or ["", f"{UNKNOWN}: `everstep evaluate` has not measured this checkpoint."]
    return ["## Metrics", *lines, ""]


def _evaluation(found: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, part in found["sets"].items():
        data = f"data {str(found.get('data_digest'))[:12]}"
        lines += ["", f"Set `{name}` ({data}), {part['samples']} samples:", "", *_values(part["metrics"])]
        for label, inner in part.get("slices", {}).items():
            shown = ", ".join(f"{metric} {each['value']:.5g}" for metric, each in inner["metrics"].items())
            lines.append(f"- {part['by']} = {label} ({inner['samples']} samples): {shown}")
    return lines


def _folder(session: Session) -> RunFolder:
    return RunFolder(session.checkpoint.rpartition("/checkpoints/")[0])


def _values(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {each['value']:.5g} | {each['low']:.5g} … {each['high']:.5g} |"
        if "low" in each
        else f"| {name} | {each['value']:.5g} | |"
        for name, each in metrics.items()
    ]
    return ["| metric | value | 95 % interval |", "| --- | --- | --- |", *rows, ""]


def _newest(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest evaluation of each set of data, one with slices before one without."""
    newest: dict[tuple[object, object], dict[str, Any]] = {}
    for each in found:
        key = each.get("on"), each.get("data_digest")
        has_slices = _has_slices(each)
        known = newest.get(key)
        if known is None or has_slices or not _has_slices(known):
            newest[key] = each
    return list(newest.values())


def _has_slices(found: Mapping[str, Any]) -> bool:
    sets = found.get("sets")
    return isinstance(sets, dict) and any(isinstance(part, dict) and "slices" in part for part in sets.values())


def _evaluations(session: Session) -> Iterator[dict[str, Any]]:
    """Yield the results of `everstep evaluate` for this checkpoint and these weights."""
    folder = _folder(session)
    for name in sorted(folder.storage.names(EVALUATIONS)):
        try:
            place = f"{EVALUATIONS}/{name}/{RESULT}"
            found = mapping(parse(read_limited(folder.storage, place, LARGEST)), place)
        except (FileNotFoundError, ValueError):
            continue
        checkpoint, weights = str(found.get("checkpoint", "")), session.run.evaluate.weights.value
        if checkpoint.rpartition("/")[2] == session.checkpoint.rpartition("/")[2] and found.get("weights") == weights:
            yield found


def _cast(facts: Mapping[str, Any]) -> dict[str, object]:
    cast = facts["proof"].get("cast")
    if not cast:
        return {}
    return {"cast to": cast["dtype"] + (f", outputs move by at most {cast['largest']:.3g}" if cast["largest"] else "")}


def _origin(session: Session) -> dict[str, object]:
    folder = _folder(session)
    try:
        provenance = mapping(parse(read_limited(folder.storage, PROVENANCE, LARGEST)), PROVENANCE)
    except (FileNotFoundError, ValueError):
        provenance = {}
    code = provenance.get("code") or {}
    commit = code.get("commit", UNKNOWN) if isinstance(code, dict) else UNKNOWN
    return {"checkpoint": session.checkpoint, "code": commit}


def _table(title: str, rows: Mapping[str, object]) -> list[str]:
    return [f"## {title}", "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
