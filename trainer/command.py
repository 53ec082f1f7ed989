"""The trainer's verbs beside training: check a config, look at checkpoints and datasets."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence

from trainer.errors import ConfigError, EverstepError


def verb(arguments: Sequence[str]) -> int:
    """Run `check`, `checkpoint …` or `data …`; exit code 2 and one line for what the user got wrong."""
    try:
        if arguments[0] == "check":
            return _check(_check_parser().parse_intermixed_args(arguments[1:]))
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        return code
    except EverstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output (`head`) has gone; what is still to be flushed has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _check_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="everstep check", description="Compose a config and build its parts.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/run.yaml")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")
    return parser


def _parser() -> argparse.ArgumentParser:
    from trainer.data import command as data

    parser = argparse.ArgumentParser(prog="everstep")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    checkpoint = verbs.add_parser("checkpoint", help="list and compare checkpoints").add_subparsers(
        required=True, metavar="VERB"
    )
    ls = checkpoint.add_parser("ls", help="the checkpoints of a run")
    ls.add_argument("run_url", metavar="RUN", help="a run folder, as a path or URL")
    ls.set_defaults(run=_list)
    diff = checkpoint.add_parser("diff", help="compare two checkpoints; exit code 0 exactly when all bits are equal")
    diff.add_argument("first", metavar="A", help="a checkpoint, or a run folder for its newest")
    diff.add_argument("second", metavar="B")
    diff.set_defaults(run=_diff)
    data.add_parser(verbs)
    parser.set_defaults(run=data.run)
    return parser


def _check(options: argparse.Namespace) -> int:
    """Everything short of training that does not need the data's bytes."""
    import torch

    from trainer.build import build_task, check_plugins
    from trainer.compose import compose
    from trainer.optim import build_optimizer
    from trainer.parallel import parameters_on_meta

    run = compose(options.overrides, options.config_dir).run
    check_plugins(run)
    with parameters_on_meta(), torch.no_grad():
        model = build_task(run).model()
    if run.optimizer is None:
        raise ConfigError("optimizer=null: give optimizer=NAME")
    build_optimizer(run.optimizer, model, run.plugins)
    print(f"fine: {sum(p.numel() for p in model.parameters()):,} parameters, {run.steps} steps of {run.global_batch}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from trainer.checkpoint.manifest import candidates, was_set_aside
    from trainer.run_folder import RunFolder

    run = RunFolder(options.run_url)
    table = Table("step", "attempt", "size", "world", "metric", "written", box=None, header_style="dim")
    for found in candidates(run):
        manifest = found.manifest
        if manifest is None:
            table.add_row(str(found.step), str(found.attempt), found.damage)
            continue
        size = sum(record.bytes for record in manifest.files.values())
        written = datetime.datetime.fromtimestamp(manifest.time).strftime("%Y-%m-%d %H:%M:%S")
        metric = "" if manifest.metric is None else f"{manifest.metric:.5g}"
        world = f"{manifest.world} {manifest.parallel}"
        table.add_row(str(found.step), str(found.attempt), f"{size / 2**20:.1f} MiB", world, metric, written)
    if not table.rows:
        raise ConfigError(f"{options.run_url} holds no checkpoint; is it a run folder?")
    Console().print(table)
    for path in was_set_aside(run):
        print(f"set aside: {path}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from trainer.checkpoint.checkpointer import locate
    from trainer.checkpoint.diff import differences

    first, second = locate(options.first), locate(options.second)
    found = list(differences(first, second))
    for difference in found:
        largest = "" if difference.largest is None else f", at most {difference.largest:.3g} apart"
        print(f"{difference.name}: {difference.what}{largest}")
    print(f"{len(found)} tensors differ" if found else "all tensors are equal to the last bit")
    return 1 if found else 0
