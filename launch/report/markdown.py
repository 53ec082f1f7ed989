"""Markdown of a report, short enough for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from everstep.launch.console import duration
from everstep.launch.report.page import cell

LONGEST = 120
"""Characters of a cell."""
MOST_ATTEMPTS, MOST_KEYS, MOST_DIFFERENT = 8, 12, 8
SPECIAL = str.maketrans(
    {letter: f"\\{letter}" for letter in "\\`*_[]|~#$!"} | {"@": "@\u200b", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
)
"""Signs of Markdown; a text of the run folder must make neither a link nor a picture nor a mention."""


def markdown(facts: Mapping[str, Any]) -> str:
    """Return at most 60 lines of cleaned facts of a run."""
    parts = (_head(facts), _time(facts), _attempts(facts), _config(facts), _against(facts["against"] or {}))
    return "\n".join(chain.from_iterable(parts)).rstrip()


def shown(value: object) -> str:
    """Return a value as one line of plain text in Markdown."""
    text = " ".join(cell(value).split())
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]}…").translate(SPECIAL).replace("://", ":&#47;&#47;")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(map(shown, columns))} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(map(shown, row))} |" for row in rows)
    yield ""


def _head(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### Run {shown(facts['run'])}", "", shown_whole(facts["sentence"]), "")
    figures = facts["figures"]
    yield from table([each["name"] for each in figures], [[f"{each['value']} {each['note']}" for each in figures]])
    yield from (f"- **{shown(each['do'])}** ({shown(each['because'])})" for each in facts["advice"])


def shown_whole(sentence: str) -> str:
    return "".join(shown(sentence[at : at + LONGEST]) + " " for at in range(0, len(sentence), LONGEST)).strip()


def _time(facts: Mapping[str, Any]) -> Iterator[str]:
    spent = {part: s for part, s in facts["status"]["goodput"]["parts_s"].items() if s >= 0.5}
    told = ", ".join(f"{part} {duration(s)}" for part, s in sorted(spent.items(), key=lambda item: -item[1]))
    yield from ("", f"Time: {told}", "") if told else ("",)


def _attempts(facts: Mapping[str, Any]) -> Iterator[str]:
    attempts = facts["timeline"]["attempts"]
    if len(attempts) > 1:
        rows = [
            (each["number"], each["from_step"], each["step"], each["outcome"], each["reason"] or each["decision"])
            for each in attempts[-MOST_ATTEMPTS:]
        ]
        yield from table(["attempt", "from step", "to step", "outcome", "reason"], rows)


def _config(facts: Mapping[str, Any]) -> Iterator[str]:
    keys = [each for each in facts["changed"] if each["key"] not in ("run", "run_root")]
    if keys:
        yield from table(["key", "value", "default"], [(k["key"], k["value"], k["usual"]) for k in keys[:MOST_KEYS]])
    if len(keys) > MOST_KEYS:
        yield f"and {len(keys) - MOST_KEYS} more keys"
    code = facts["provenance"].get("code") or {}
    if isinstance(code, dict) and code.get("commit"):
        yield f"Commit {shown(code['commit'])}{', with uncommitted changes' if code.get('changed') else ''}"


def _against(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        return
    yield from ("", f"Against {shown(found['runs'][1])}:", "")
    parts = ("config", "data", "packages", "figures")
    pairs = [(part, key, *pair) for part in parts for key, pair in found[part].items()]
    different = [row for row in pairs if row[2] != row[3]]
    yield from table(["part", "name", "this run", "the other"], different[:MOST_DIFFERENT])
    yield f"{max(0, len(different) - MOST_DIFFERENT)} more differences, {len(found['code'])} lines of code differ"
