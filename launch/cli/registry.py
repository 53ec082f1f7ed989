"""`everstep registry …`: versions of models in a folder or bucket, and aliases such as prod."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError, DataError, printable
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.runs.lookup import add_root
from everstep.registry.condition import parse
from everstep.registry.records import AliasMove, Version
from everstep.registry.registry import MovedError, Registry

EXAMPLES = """examples:
  everstep registry add s3://bucket/models spam model/ --note 'first with the new data'
  everstep registry ls s3://bucket/models
  everstep registry promote s3://bucket/models spam@7 --to prod --why 'better on every slice'
  everstep registry promote s3://bucket/models spam@7 --to prod --if 'accuracy >= prod.accuracy - 0.001'
  everstep registry rollback s3://bucket/models spam@prod
  everstep registry get s3://bucket/models spam@prod model/

exit codes: 0 done; 1 the condition of --if does not hold; 2 wrong usage, or it cannot be measured
"""
TRIES = 5
"""Measurements of one promotion, if other promotions come in between."""


def registry(arguments: Sequence[str]) -> int:
    """Run one of the verb's own verbs."""
    options = _parsed(arguments)
    options.run(Registry(options.url), options)
    return 0


def _list(models: Registry, options: argparse.Namespace) -> None:
    names = [options.model] if options.model else models.models()
    rows = []
    for name in names:
        aliases = models.aliases(name)
        for number in models.versions(name):
            try:
                version = models.version(name, number)
            except DataError as error:  # one bad record hides no other
                rows.append([f"{name}@{number}", *[""] * 5, str(error)])
                continue
            pointing = ", ".join(alias for alias, move in aliases.items() if move.version == number)
            facts = version.facts
            known = [_word(facts, "format"), _word(facts, "step"), _when(version.time), version.by, version.note]
            rows.append([str(version), pointing, *known])
    if not rows:
        which = f" {options.model}" if options.model else ""
        raise ConfigError(f"{models.url} has no model{which}; everstep registry add puts one there")
    _print(("version", "alias", "format", "step", "added", "by", "note"), rows)


def _add(models: Registry, options: argparse.Namespace) -> None:
    version = models.add(options.model, options.folder, options.note)
    _say(f"{version} in {models.url}: {len(version.files)} files, digest {version.digest[:12]}")


def _show(models: Registry, options: argparse.Namespace) -> None:
    model, _, alias = options.version.partition("@")
    version = models.find(options.version)
    note = f": {version.note}" if version.note else ""
    _say(f"{version} in {models.url}, added {_when(version.time)} by {version.by}{note}")
    for key in ("checkpoint", "format", "weights", "parameters", "summary"):
        if key in version.facts:
            _say(f"  {key}: {version.facts[key]}")
    _print(("file", "bytes", "BLAKE3"), [[name, str(file.bytes), file.blake3] for name, file in version.files.items()])
    if alias and not alias.isdigit():
        _print(
            ("move", "version", "what", "when", "by", "why"), [_moved(move) for move in models.history(model, alias)]
        )


def _promote(models: Registry, options: argparse.Namespace) -> None:
    version = models.find(options.version)
    if options.condition:
        move = _promote_if(models, version, options)
    elif options.overrides:
        raise ConfigError(f"{options.overrides[0]}: changes the data of --if only; give a condition, or leave it out")
    else:
        move = models.promote(version, options.to, options.why)
    _say(f"{version.model}@{options.to} is version {move.version} (move {move.number})")


def _promote_if(models: Registry, version: Version, options: argparse.Namespace) -> AliasMove:
    """Promote a version that its condition holds for; measure again if the champion has changed meanwhile."""
    from everstep.launch.promotion import champions_of, check_condition

    condition = parse(options.condition)
    for left in reversed(range(TRIES)):
        champions, after = champions_of(models, version.model, condition, options.to)
        last = models.newest(version.model, options.to)
        if last is not None and last.version == version.number:
            return last
        if not after:
            _say(f"{version.model}@{options.to}: no champion yet")
        verdict = check_condition(version, champions, condition, options)
        _say(f"--if {condition.text!r} holds: {verdict}")
        why = "; ".join(filter(None, [options.why, f"{condition.text}: {verdict}"]))
        try:
            return models.promote(version, options.to, why, after)
        except MovedError as error:
            if not left:
                raise
            _say(f"{error.args[0].partition(';')[0]}, so it is measured again")
    raise ValueError(TRIES)


def _rollback(models: Registry, options: argparse.Namespace) -> None:
    model, _, alias = options.alias.partition("@")
    if not alias:
        raise ConfigError(f"{options.alias}: write MODEL@ALIAS, such as {model}@prod")
    move = models.rollback(model, alias, options.why)
    _say(f"{model}@{alias} is version {move.version} again (move {move.number})")


def _get(models: Registry, options: argparse.Namespace) -> None:
    if Path(options.folder).exists():
        raise ConfigError(f"{options.folder} is there already; choose another folder")
    version = models.find(options.version)
    models.fetch(version, options.folder)
    _say(f"{options.folder}: {version}, {len(version.files)} files, each verified")


def _moved(move: AliasMove) -> list[str]:
    return [str(move.number), str(move.version), move.kind, _when(move.time), move.by, move.why]


def _word(facts: Any, key: str) -> str:
    return str(facts.get(key, ""))


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _say(line: str) -> None:
    print(printable(line))


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, header_style="dim")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep registry",
        description="Versions of models in a folder or bucket, and aliases that point to them; there is no server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Arguments)
    ls = _verb(verbs, "ls", _list, "all models, or the versions of one")
    ls.add_argument("model", nargs="?", metavar="MODEL")
    add = _verb(verbs, "add", _add, "a new version: the folder of an export")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("folder", metavar="FOLDER", help="what everstep export wrote")
    add.add_argument("--note", default="", help="a line about this version")
    show = _verb(verbs, "show", _show, "one version; of an alias its history too")
    show.add_argument("version", metavar="MODEL[@N|@ALIAS]")
    promote = _verb(verbs, "promote", _promote, "point an alias to a version")
    promote.add_argument("version", metavar="MODEL@N")
    promote.add_argument("--to", required=True, metavar="ALIAS", help="such as prod")
    promote.add_argument("--why", default="", help="the reason, for the history")
    promote.add_argument(
        "--if", dest="condition", default="", metavar="CONDITION", help="such as 'accuracy >= prod.accuracy - 0.001'"
    )
    promote.add_argument("--on", default="validation", metavar="SET", help="set that --if is measured on")
    promote.add_argument("--trust", action="store_true", help="run what the folder of another user names")
    add_root(promote)
    add_overrides(promote, "other data for --if: data.path=…")
    promote.set_defaults(verb="registry promote")
    back = _verb(verbs, "rollback", _rollback, "point an alias to the version that it had before")
    back.add_argument("alias", metavar="MODEL@ALIAS")
    back.add_argument("--why", default="", help="the reason, for the history")
    get = _verb(verbs, "get", _get, "copy a version into a new folder, verified")
    get.add_argument("version", metavar="MODEL[@N|@ALIAS]")
    get.add_argument("folder", metavar="FOLDER")
    return parser


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; changes of keys may stand anywhere behind the verb."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _verb(verbs: Any, name: str, run: Any, meaning: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=meaning)
    parser.add_argument("url", metavar="URL", help="the registry: a folder or bucket")
    parser.set_defaults(run=run)
    return parser
