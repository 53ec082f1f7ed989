"""`everstep data prepare | inspect | verify | tag | trace | exclude`: datasets on the command line.

The verb that needs PyArrow imports it, so that the parser costs nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from everstep.dataset.index import ShardIndex, folders
from everstep.errors import ConfigError, DataError, printable
from everstep.trainer.data import exclude_cli
from everstep.trainer.data.ordering import trace_cli

EPILOG = """\
everstep data prepare src='s3://lake/events/*.parquet' dst=s3://bucket/events columns=[a,b]
everstep data prepare src=docs/ dst=data/docs tokenizer=bytes pack=1024 validation=0.05
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `data` with its own verbs; the caller passes the parsed namespace to `run`."""
    data = subparsers.add_parser("data", help="prepare, inspect and verify datasets, trace samples")
    verbs = data.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    make = verbs.add_parser(
        "prepare",
        help="turn any source into a dataset of Arrow shards; goes on where it was killed",
        epilog=f"{EPILOG}\nkeys: {', '.join(_keys())} (docs/data.md)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("words", nargs="*", metavar="key=value")
    verbs.add_parser("inspect", help="what a dataset holds").add_argument("dst", metavar="DST")
    check = verbs.add_parser("verify", help="check every part of every shard against its digest")
    check.add_argument("dst", metavar="DST")
    check.add_argument("--repair-from", metavar="SRC", help="another copy of the dataset, to take good shards from")
    tag = verbs.add_parser("tag", help="set tags of a dataset, such as its licence; its samples stay as they are")
    tag.add_argument("dst", metavar="DST")
    tag.add_argument("tags", nargs="+", metavar="NAME=VALUE", help="NAME= takes a tag away")
    trace_cli.add_parser(verbs)
    exclude_cli.add_parser(verbs)


def _keys() -> tuple[str, ...]:
    from everstep.dataset.prepare.options import KEYS

    return KEYS


def run(args: argparse.Namespace) -> int:
    """Run the verb and return the exit code; the caller shows an EverstepError."""
    verbs = {
        "prepare": _prepare,
        "inspect": _inspect,
        "verify": _verify,
        "tag": _tag,
        "trace": trace_cli.run,
        "exclude": exclude_cli.run,
    }
    return verbs[args.data_verb](args)


def _prepare(args: argparse.Namespace) -> int:
    from everstep.dataset.prepare import prepare
    from everstep.dataset.prepare.options import parse

    options = parse(args.words)
    try:
        prepare(options, show=True)
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130
    args.dst = options.dst
    return _inspect(args)


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from everstep.dataset.prepare.ledger import MADE
    from everstep.dataset.verify import datasets

    console = Console()
    for folder in datasets(args.dst):
        index = ShardIndex.read(folder)
        table = Table("", "", box=None, show_header=False, title=folder, title_justify="left")
        table.columns[1].overflow = "fold"
        columns = printable(
            ", ".join(f"{name} {column.type}{_shape(column.shape)}" for name, column in index.columns.items())
        )
        size = f"{index.bytes / 1e6:,.3g}" if index.bytes < 1e8 else f"{index.bytes / 1e6:,.0f}"
        for name, value in (("samples", f"{index.rows:,}"), ("shards", f"{len(index.shards):,}"), ("MB", size)):
            table.add_row(name, value)
        table.add_row("columns", escape(printable(columns)))
        table.add_row("digest", index.digest)
        for name, value in index.attributes.items():
            if name == MADE:  # marks that have no meaning for a reader
                continue
            parts = [f"{key}:{each}" for key, each in value.items()] if isinstance(value, dict) else value
            shown = ", ".join(map(str, parts)) if isinstance(parts, list) else str(parts)
            table.add_row(escape(printable(name)), escape(printable(shown)))
        console.print(table)
    return 0


def _tag(args: argparse.Namespace) -> int:
    from everstep.dataset.tags import TAGS, checked_tags

    given = dict(word.partition("=")[::2] for word in args.tags)
    if wrong := [word for word in args.tags if "=" not in word]:
        raise ConfigError(f"{wrong[0]}: write NAME=VALUE, such as license=CC0")
    for folder in folders(args.dst):
        index = ShardIndex.read(folder)
        try:
            tags = checked_tags({name: value for name, value in {**index.tags, **given}.items() if value})
        except ValueError as error:
            raise ConfigError(f"{error}; write NAME=VALUE, such as license=CC0") from error
        attributes = {name: value for name, value in index.attributes.items() if name != TAGS}
        replace(index, attributes=attributes | ({TAGS: tags} if tags else {})).write(folder)
    return _inspect(args)


def _shape(shape: tuple[int | None, ...]) -> str:
    return "" if not shape else "×".join("?" if size is None else str(size) for size in shape).join("[]")


def _verify(args: argparse.Namespace) -> int:
    from everstep.dataset.prepare.progress import Progress, counted
    from everstep.dataset.verify import datasets, repair, verify

    indexes = [ShardIndex.read(folder) for folder in datasets(args.dst)]
    shards = sum(len(index.shards) for index in indexes)
    with Progress("verify", sum(index.bytes for index in indexes), True) as progress:
        damages = verify(args.dst, lambda size: progress.add(0, size))
    if not damages:
        print(printable(f"{args.dst} is whole: {counted(shards, 'shard')} checked against the index"))
        return 0
    if args.repair_from is None:
        listed = "; ".join(map(str, damages))
        raise DataError(
            f"{len(damages)} of {shards} shards are bad: {listed}; mend them with --repair-from and the path or URL "
            "of a copy, or prepare the dataset again"
        )
    left = 0
    for damage, why in repair(damages, args.dst, args.repair_from):
        left += bool(why)
        print(printable(f"{damage}: {f'not mended, {why}' if why else 'mended'}"))
    if left:
        raise DataError(f"{left} of {shards} shards are still bad; give another copy with --repair-from")
    print(
        printable(
            f"{args.dst} is whole again: {len(damages)} of {counted(shards, 'shard')} came from {args.repair_from}"
        )
    )
    return 0
