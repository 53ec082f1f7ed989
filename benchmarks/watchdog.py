"""Cost of a mark of the watchdog, several of which are made in every step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

from benchmarks.table import machine, markdown
from everstep.trainer.watchdog.activity import Activity, Phase


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    activity = Activity()
    activity.share()
    activity.measure((Phase.data, Phase.forward))
    rows = [["mark", *_cost(lambda: activity.at(Phase.forward, 7, 2), options)],
            ["tick", *_cost(activity.tick, options)]]  # fmt: skip
    print(f"{options.marks} calls, best of {options.rounds} rounds; {machine()}\n")
    print(markdown(("call", "wall, µs", "CPU, µs"), rows))
    return 0


def _cost(call: Callable[[], None], options: argparse.Namespace) -> tuple[str, str]:
    """Return microseconds of a call, of the clock and of the CPU: another process may have had it meanwhile."""
    found = []
    for clock in (time.perf_counter, time.process_time):
        rounds = []
        for _ in range(options.rounds):
            start = clock()
            for _ in range(options.marks):
                call()
            rounds.append((clock() - start) / options.marks * 1e6)
        found.append(f"{min(rounds):.2f}")
    return found[0], found[1]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks watchdog", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--marks", type=int, default=100_000)
    return parser
