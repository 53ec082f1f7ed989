"""`everstep data trace RUN --sample NAME | --step N [--microbatch M]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from everstep.errors import ConfigError
from everstep.run_folder import RunFolder

if TYPE_CHECKING:
    from everstep.trainer.data.ordering.trace import Visit

SHOWN = 40
"""Lines of a printed table; --json prints all."""
WIDTH = 140


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `trace`; the caller passes the parsed namespace to `run`."""
    trace = verbs.add_parser("trace", help="which steps of a run used a sample, or which samples a step used")
    trace.add_argument("run_url", metavar="RUN", help="a run folder, as a path or URL")
    what = trace.add_mutually_exclusive_group(required=True)
    what.add_argument("--sample", metavar="ID", help="an id, FILE:ROW of a shard, or COLUMN=VALUE")
    what.add_argument("--step", type=int, metavar="N", help="a step, as the log counts them")
    trace.add_argument("--microbatch", type=int, metavar="M", help="of a step: only this one, from 0")
    trace.add_argument("--json", action="store_true", help="one JSON object a line, all of them")


def run(args: argparse.Namespace) -> int:
    from everstep.trainer.data.ordering.trace import Trace

    if args.step is None and args.microbatch is not None:
        raise ConfigError(f"--microbatch {args.microbatch}: give the --step too")
    trace = Trace(RunFolder(args.run_url))
    if args.step is not None:
        found = trace.step(args.step, args.microbatch)
    else:
        from everstep.trainer.data.ordering.sample_names import sample_ids

        found = [visit for sample in sample_ids(trace, args.sample) for visit in trace.visits(sample)]
    if args.json:
        for visit in found:
            print(json.dumps(visit.to_json()))
    elif not found:
        print(f"no step up to {trace.steps} uses it; an epoch has {trace.order.samples:,} samples")
    else:
        _print_table(found)
    return 0


def _print_table(found: Sequence[Visit]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*found[0].to_json(), box=None, header_style="dim")
    for visit in found[:SHOWN]:
        table.add_row(*(str(value) for value in visit.to_json().values()))
    # Names of shards must not be truncated: a user searches for them.
    Console(width=max(Console().width, WIDTH)).print(table)
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN:,} more; --json prints all")
