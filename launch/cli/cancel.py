"""`everstep cancel RUN…`: cancel runs and sweeps on any machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everstep.errors import EverstepError
from everstep.launch.parser import Arguments
from everstep.launch.runs.cancellation import cancel_run
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.sweep.sweep_folder import SweepFolder, sweep_at
from everstep.run_folder import RunFolder


def cancel(arguments: Sequence[str]) -> int:
    """Run the verb; one line for each run. Exit code 2 when one cannot be cancelled; the others are."""
    options = _parser().parse_args(arguments)
    code = 0
    found = [sweep_at(word, options.root) or find(word, options.root) for word in options.run]
    for folder in found:
        try:
            said = cancel_run(folder) if isinstance(folder, RunFolder) else _cancel_sweep(folder)
        except EverstepError as error:
            said, code = f"not cancelled: {error}", error.exit_code
        print(f"{folder.url.rsplit('/', 1)[-1]}: {said}", flush=True)
    return code


def _cancel_sweep(folder: SweepFolder) -> str:
    from everstep.launch.sweep import status  # imported for a sweep only, to keep start-up fast

    return status.cancel(folder)


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep cancel", description="Stop runs for good; 'everstep resume' goes on from the last checkpoint."
    )
    add_run(parser, several=True)
    return parser
