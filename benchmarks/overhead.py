"""What a trainer adds to a step: a small model, so that the step is short and the trainer's own work shows.

Each round runs every contestant once, in a fresh process; ratios are to `plain` of the same round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.contest import CONTESTANTS, FailedError, MissingError, chosen, run
from benchmarks.table import figures, machine, markdown, ratios, spread

SEVERAL = ("plain", "plain_fused", "floor", "everstep", "fabric", "accelerate")
"""Contestants with more than one process."""
HEAD = ("contestant", "n", "step, median µs", "step, mean µs", "CPU a step, µs",
        "median / plain", "mean / plain", "CPU / plain")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    default = [c.name for c in CONTESTANTS] if options.processes == 1 else SEVERAL
    contestants = chosen(options.only, default)
    rounds: dict[str, list[dict[str, float]]] = {"median": [], "mean": [], "cpu": []}
    absent: dict[str, str] = {}
    for number in range(options.rounds):
        for figure in rounds.values():
            figure.append({})
        for contestant in contestants:
            if contestant.name in absent:
                continue
            try:
                contestant.check()
                seen = run(contestant.argv(options.processes), {"STEPS": options.steps, "WARMUP": options.warmup})
            except (MissingError, FailedError) as error:
                absent[contestant.name] = str(error)
                continue
            rounds["median"][-1][contestant.name] = statistics.median(seen["gaps_us"])
            rounds["mean"][-1][contestant.name] = statistics.fmean(seen["gaps_us"])
            rounds["cpu"][-1][contestant.name] = seen["cpu_us"]
        print(f"round {number + 1}: " + "  ".join(f"{k} {v:.0f}" for k, v in rounds["median"][-1].items()), flush=True)
    print(f"\n{options.processes} process(es), {options.steps} steps after {options.warmup}; {machine()}\n")
    names = sorted((c.name for c in contestants), key=lambda name: _order(figures(rounds["median"], name)))
    print(markdown(HEAD, [_row(name, rounds, absent) for name in names]))
    for name, why in absent.items():
        print(f"\n{name}: {why}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=100, help="steps before them")
    parser.add_argument("--processes", type=int, default=1, help="more than one: DDP over gloo, under torchrun")
    parser.add_argument("--only", default="", metavar="A,B", help="contestants; plain is needed for ratios")
    return parser


def _order(values: list[float]) -> float:
    return statistics.median(values) if values else float("inf")


def _row(name: str, rounds: dict[str, list[dict[str, float]]], absent: dict[str, str]) -> list[str]:
    count = str(len(figures(rounds["median"], name)))
    if name in absent:
        reason = absent[name].splitlines()[-1] if absent[name] else ""
        return [name, count, f"not measured: {reason[:80]}", *["–"] * (len(HEAD) - 3)]
    kinds = ("median", "mean", "cpu")
    return [
        name,
        count,
        *(spread(figures(rounds[kind], name), 4) for kind in kinds),
        *(spread(ratios(rounds[kind], name, "plain")) for kind in kinds),
    ]
