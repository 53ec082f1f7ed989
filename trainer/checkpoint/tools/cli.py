"""`everstep checkpoint ls | verify | diff | export | rm`: a run's checkpoints on the command line."""

from __future__ import annotations

import argparse
import datetime
import sys
from typing import TYPE_CHECKING

from everstep.errors import ConfigError, printable

if TYPE_CHECKING:
    from everstep.trainer.checkpoint.tools.inventory import ListedCheckpoint


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `checkpoint` with its own verbs; each sets `run`, which takes the parsed namespace."""
    checkpoint = subparsers.add_parser("checkpoint", help="list, verify, compare and remove checkpoints")
    verbs = checkpoint.add_subparsers(required=True, metavar="VERB")
    ls = verbs.add_parser("ls", help="the checkpoints of a run, those set aside and those never committed")
    ls.add_argument("url", metavar="RUN", help="a run folder, as a path or URL")
    ls.set_defaults(run=_list)
    verify = verbs.add_parser("verify", help="hold every file to its size and digest; exit code 0 when all are whole")
    verify.add_argument("url", metavar="RUN|CHECKPOINT", help="a run folder, or one checkpoint in it")
    verify.set_defaults(run=_verify)
    diff = verbs.add_parser("diff", help="compare two checkpoints; exit code 0 exactly when all bits are equal")
    diff.add_argument("first", metavar="A", help="a checkpoint, or a run folder for its newest")
    diff.add_argument("second", metavar="B")
    diff.set_defaults(run=_diff)
    export = verbs.add_parser("export", help="the model's weights as one safetensors file")
    export.add_argument("url", metavar="CHECKPOINT", help="a checkpoint, or a run folder for its newest")
    export.add_argument("to", metavar="FILE", help="a path on this machine, such as weights.safetensors")
    export.add_argument("--only-trained", action="store_true", help="leave out what was frozen (for adapters)")
    export.add_argument("--weights", choices=("model", "ema"), default="model", help="ema: their moving average")
    export.set_defaults(run=_export)
    _add_rm(verbs)


def _add_rm(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rm = verbs.add_parser("rm", help="remove checkpoints, but not the one that the run goes on from")
    rm.add_argument("urls", nargs="+", metavar="CHECKPOINT", help="checkpoints; or one run, with a rule")
    rm.add_argument("--older-than-step", type=int, metavar="N", help="of a run: all of steps before N")
    rm.add_argument("--orphans", action="store_true", help="of a run: saves that were cut short")
    rm.add_argument("--even-the-newest", action="store_true", help="also the newest checkpoint that verifies")
    rm.add_argument("--dry-run", action="store_true", help="only say what would go, and its size")
    rm.set_defaults(run=_remove)


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from everstep.run_folder import RunFolder, meant
    from everstep.trainer.checkpoint.tools.inventory import best_step, survey

    run = RunFolder(options.url)
    found = survey(run)
    best = best_step(found)
    if not found:
        raise ConfigError(f"{options.url} holds no checkpoint{meant(options.url) or '; is it a run folder?'}")
    names = ("step", "samples", "attempt", "by", "size", "world", "metric", "written", "digest", "state")
    table = Table(*names, box=None, header_style="dim")
    hosts = {each.attempt: run.host(each.attempt) or "" for each in found}
    for each in found:
        mark = ", best" if each.is_committed and each.step == best else ""
        *cells, state = _row(each, hosts[each.attempt])
        table.add_row(*map(escape, map(printable, (*cells, state + mark))))
    # A program that reads this output needs whole lines, so only a terminal truncates them.
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    return 0


def _row(found: ListedCheckpoint, host: str) -> list[str]:
    from blake3 import blake3

    from everstep.trainer.checkpoint.manifest import Committed

    checkpoint = found.checkpoint
    if not isinstance(checkpoint, Committed):
        state = found.kind.value if checkpoint is None else checkpoint.why
        return [str(found.step), "", str(found.attempt), host, "", "", "", "", "", state]
    manifest = checkpoint.manifest
    metric = "" if manifest.metric is None else f"{manifest.metric:.5g}"
    written = datetime.datetime.fromtimestamp(manifest.time).strftime("%Y-%m-%d %H:%M:%S")
    world = f"{manifest.world} {manifest.parallel}"
    digest = blake3(found.data).hexdigest()[:12]
    numbers = [str(found.step), str(manifest.samples), str(found.attempt)]
    return [*numbers, host, _mib(manifest.size), world, metric, written, digest, found.kind.value]


def _verify(options: argparse.Namespace) -> int:
    from everstep.run_folder import MANIFEST
    from everstep.trainer.checkpoint.manifest import Committed
    from everstep.trainer.checkpoint.tools.inventory import committed, faults

    run, checkpoints = committed(options.url)
    bad = 0
    for found, wrong in faults(run, checkpoints):
        if wrong and not run.storage.exists(f"{found.path}/{MANIFEST}"):
            print(printable(f"{found.path}: removed meanwhile"))
            continue
        bad += bool(wrong)
        if isinstance(found, Committed) and not wrong:
            what = f"whole, {len(found.manifest.files)} files, {_mib(found.manifest.size)}"
        else:
            what = "; ".join(wrong)
        print(printable(f"{found.path}: {what}"), flush=True)
    return 1 if bad else 0


def _remove(options: argparse.Namespace) -> int:
    from everstep.run_folder import RunFolder
    from everstep.trainer.checkpoint.tools.inventory import check_removable, named, newest_good, remove, selected, size

    if options.older_than_step is None and not options.orphans:
        doomed = named(options.urls)
    elif len(options.urls) == 1:
        run = RunFolder(options.urls[0])
        chosen = selected(run, options.older_than_step, options.orphans)
        newest = newest_good(run) if chosen and not options.even_the_newest else None
        if any(found.path == newest for found in chosen):
            print(
                printable(f"kept {run.url}/{newest}: the run goes on from it (--even-the-newest would remove it too)")
            )
        doomed = [(run, [found for found in chosen if found.path != newest])]
    else:
        raise ConfigError(
            f"--older-than-step and --orphans take one run, not {len(options.urls)}; give them one by one"
        )
    for run, found in doomed:
        check_removable(run, found, options.even_the_newest)
    total = 0
    for run, found in doomed:
        for each in found:
            total += (taken := size(run, each))
            if not options.dry_run:
                remove(run, each)
            print(
                printable(f"{'would remove' if options.dry_run else 'removed'} {run.url}/{each.path} ({_mib(taken)})")
            )
    count = sum(len(found) for _, found in doomed)
    print(f"{'would remove' if options.dry_run else 'removed'} {count} in all, {_mib(total)}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from everstep.trainer.checkpoint.restore import locate
    from everstep.trainer.checkpoint.tools.diff import config_changes, differences

    first, second = locate(options.first), locate(options.second)
    found = list(differences(first, second))
    for difference in found:
        far = "" if difference.largest is None else f", at most {difference.largest:.3g} apart"
        far += "" if difference.cosine is None else f", cosine {difference.cosine:.9g}"
        print(printable(f"{difference.name}: {difference.what}{far}"))
    for change in config_changes(first[0], second[0]):
        print(printable(f"config: {change}"))
    print(f"{len(found)} tensors differ" if found else "all tensors are equal to the last bit")
    return 1 if found else 0


def _export(options: argparse.Namespace) -> int:
    from everstep.trainer.checkpoint.restore import locate
    from everstep.trainer.checkpoint.tools.diff import export

    run, path = locate(options.url)
    count = export(run, path, options.weights, options.to, options.only_trained)
    print(printable(f"{options.to}: {count} tensors of {run.url}/{path}"))
    return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
