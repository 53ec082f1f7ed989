"""The trainer's verbs other than training: check a config, inspect checkpoints and datasets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from everstep.errors import EverstepError, misread, printable
from everstep.security.secret_detection import without_secrets


def verb(arguments: Sequence[str]) -> int:
    """Run a verb; exit code 2 and one line for a mistake of the user."""
    try:
        if arguments[0] == "check":
            from everstep.trainer.preflight.check import check

            return check(_check_parser().parse_intermixed_args(arguments[1:]))
        options = _parser().parse_args(arguments)
        code: int = getattr(options, "run_verb", options.run)(options)
        return code
    except EverstepError as error:
        if not error.told:  # the rank that found it says so
            print(printable(without_secrets(f"error: {error}")), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output (`head`) has gone; the exit flushes the rest to /dev/null instead.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Arguments(argparse.ArgumentParser):
    """Parser that raises a usage mistake as an EverstepError."""

    def error(self, message: str) -> NoReturn:
        raise misread(message, _options(self), f"{self.prog} --help")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield all options of a parser and its verbs: an option that a verb lacks is reported by its parent."""
    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for verb in dict.fromkeys(action.choices.values()):
                yield from _options(verb)


def _check_parser() -> argparse.ArgumentParser:
    from everstep.trainer.preflight.check import add_arguments

    parser = _Arguments(prog="everstep check", description="Compose a config and build its parts.")
    add_arguments(parser)
    return parser


def _parser() -> argparse.ArgumentParser:
    from everstep.trainer.checkpoint.tools import cli as checkpoint
    from everstep.trainer.data import cli as data
    from everstep.trainer.explanation import cli as explanation
    from everstep.trainer.inference import cli as inference
    from everstep.trainer.replay import cli as replay
    from everstep.trainer.reporting.trackers import sync

    parser: argparse.ArgumentParser = _Arguments(prog="everstep")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    checkpoint.add_parser(verbs)
    data.add_parser(verbs)
    inference.add_parsers(verbs)
    explanation.add_parser(verbs)
    replay.add_parser(verbs)
    sync.add_parser(verbs)
    parser.set_defaults(run=data.run)
    return parser
