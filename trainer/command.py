"""The trainer's verbs beside training: check a config, look at checkpoints and datasets."""

from __future__ import annotations

import argparse
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
    from trainer.checkpoint import command as checkpoint
    from trainer.data import command as data

    parser = argparse.ArgumentParser(prog="everstep")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    checkpoint.add_parser(verbs)
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
