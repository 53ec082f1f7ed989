"""`everstep top`: all runs below a folder, live in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import ROOT
from everstep.storage import open_storage

LEAST_S = 0.5


def top(arguments: Sequence[str]) -> int:
    """Run the verb until the user quits."""
    options = _parser().parse_args(arguments)
    if options.every < LEAST_S:
        raise ConfigError(f"--every {options.every:g}: a look at all runs takes a moment (at least {LEAST_S:g} s)")
    if not open_storage(options.root).names():
        raise ConfigError(f"{options.root} holds no run; 'everstep top ROOT' looks elsewhere")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("everstep top needs a terminal; 'everstep ls --json' is for scripts")
    try:
        from everstep.launch.top.app import TopApp
    except ImportError as error:
        raise ConfigError(f"everstep top needs {error.name}: pip install 'everstep[top]'") from error
    TopApp(options.root, options.every).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="everstep top", description="All runs below a folder, live; Enter opens one.")
    parser.add_argument("root", nargs="?", default=ROOT, metavar="ROOT", help=f"a path or any URL ({ROOT})")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    return parser
