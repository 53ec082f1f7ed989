"""`everstep data prepare | inspect | verify`: datasets, from the command line.

PyArrow is imported by the verb that needs it, so that the parser costs nothing.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator

from trainer.data.index import ShardIndex
from trainer.errors import DataError, EverstepError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `data` with its own verbs; the parsed namespace goes to `run`."""
    data = subparsers.add_parser("data", help="prepare, inspect and verify datasets")
    verbs = data.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    make = verbs.add_parser("prepare", help="turn files into a dataset of byte blocks")
    make.add_argument("--src", required=True, nargs="+", metavar="GLOB", help="files to read; ** goes into folders")
    make.add_argument("--dst", required=True, help="folder to write; it must not exist")
    make.add_argument("--block", type=int, default=128, metavar="N", help="bytes a sample (default 128)")
    make.add_argument(
        "--validation-every", type=int, default=20, metavar="N", help="hold out every N-th file (default 20)"
    )
    make.add_argument("--shard-mib", type=int, default=64, metavar="N", help="MiB a shard (default 64)")
    for verb, text in (("inspect", "what a dataset holds"), ("verify", "check every shard's digest")):
        verbs.add_parser(verb, help=text).add_argument("dst", metavar="DST")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 after one clear line on stderr."""
    verbs = {"prepare": _prepare, "inspect": _inspect, "verify": _verify}
    try:
        return verbs[args.data_verb](args)
    except EverstepError as error:
        print(f"everstep: {error}", file=sys.stderr)
        return error.exit_code


def _prepare(args: argparse.Namespace) -> int:
    from trainer.data.prepare import prepare_blocks, prepared

    if prepared(args.dst):
        raise DataError(f"{args.dst} is a dataset already; choose another --dst or remove it")
    prepare_blocks(
        _files(args.src),
        args.dst,
        args.block,
        validation_every=args.validation_every,
        shard_bytes=max(1, args.shard_mib) << 20,
    )
    return _inspect(args)


def _files(patterns: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the files, each once, in the order of names; the shell may have spread the patterns already."""
    names = {name for pattern in patterns for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    if not names:
        raise DataError(f"--src {' '.join(patterns)} matches no file")
    for name in sorted(names):
        with open(name, "rb") as file:
            yield name, file.read()


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("dataset", "samples", "shards", "MB", "columns", "digest")
    for folder in _datasets(args.dst):
        index = ShardIndex.read(folder)
        columns = ", ".join(f"{name} {column.type}{list(column.shape)}" for name, column in index.columns.items())
        size = f"{index.bytes / 1e6:,.1f}"
        table.add_row(folder, f"{index.rows:,}", str(len(index.shards)), size, columns, index.digest[:16])
    Console().print(table)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from trainer.data.prepare import verify

    damage = verify(args.dst)
    if damage:
        raise DataError("; ".join(damage) + "; copy the shard back or prepare the dataset again")
    shards = sum(len(ShardIndex.read(folder).shards) for folder in _datasets(args.dst))
    print(f"{args.dst} is whole: {shards} shards match their digests")
    return 0


def _datasets(dst: str) -> list[str]:
    from trainer.data.prepare import TRAIN, VALIDATION, prepared

    return [os.path.join(dst, split) for split in (TRAIN, VALIDATION)] if prepared(dst) else [dst]
