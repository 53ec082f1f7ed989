"""`python -m benchmarks checkpoint`: what a save costs the steps, when it is durable, and how long a load takes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contest import Contestant, FailedError, MissingError, chosen, run
from benchmarks.table import figures, machine, markdown, ratios, spread

NAMES = (
    ("limit", None),
    ("everstep", None),
    ("dcp_thread", None),
    ("dcp_process", None),
    ("dcp_sync", None),
    ("torch_save", None),
    ("safetensors_file", None),
    ("lightning_async", "lightning"),
    ("torchsnapshot_async", "torchsnapshot"),
)
CONTESTANTS = tuple(Contestant(name, package, "benchmarks.checkpoint.contestants") for name, package in NAMES)
RATIOS = ("blocked_s", "first_blocked_s", "durable_s", "load_s")
HEAD = ("contestant", "n", "blocked, s", "first blocked, s", "durable, s", "steps meanwhile / quiet", "load, s",
        "extra / state", "blocked / limit", "first blocked / limit", "durable / limit", "load / limit")  # fmt: skip

Seen = Mapping[str, Mapping[str, Any]]


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    contestants = chosen(options.only, [c.name for c in CONTESTANTS], CONTESTANTS)
    absent: dict[str, str] = {}
    seen: list[Seen] = []
    for number in range(options.rounds):
        seen.append(_round(contestants, absent, options.tensors))
        told = "  ".join(f"{name} {one['blocked_s']:.3f}" for name, one in seen[-1].items())
        print(f"round {number + 1}, blocked: {told}", flush=True)
    size_mb = options.tensors * 2000 * 2000 * 4 / 1e6
    print(f"\n{size_mb:.0f} MB in {options.tensors} tensors, the second save of a process; {machine()}\n")
    print(markdown(HEAD, [_row(c.name, seen, absent) for c in contestants]))
    for name, why in absent.items():
        print(f"\n{name}: {why}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensors", type=int, default=33, help="of 16 MB each")
    names = ", ".join(contestant.name for contestant in CONTESTANTS)
    parser.add_argument("--only", default="", metavar="A,B", help=f"of {names}; limit is needed for ratios")
    return parser


def _round(contestants: Sequence[Contestant], absent: dict[str, str], tensors: int) -> Seen:
    seen = {}
    for contestant in contestants:
        if contestant.name in absent:
            continue
        try:
            contestant.check()
            one = run(contestant.argv(1), {"TENSORS": tensors})
            if not one["equal"]:
                raise FailedError("what was loaded is not what was saved")
            seen[contestant.name] = one
        except (MissingError, FailedError) as error:
            absent[contestant.name] = str(error)
    return seen


def _row(name: str, seen: Sequence[Seen], absent: Mapping[str, str]) -> list[str]:
    if name in absent:
        return [name, "0", f"not measured: {absent[name].splitlines()[-1][:80]}", *["–"] * (len(HEAD) - 3)]
    keys = ("blocked_s", "first_blocked_s", "durable_s", "rate", "load_s", "extra")
    columns = {key: [{n: one[key] for n, one in each.items()} for each in seen] for key in keys}
    shown = [spread(figures(columns[key], name)) for key in keys]
    over = [spread(ratios(columns[key], name, "limit")) for key in RATIOS]
    return [name, str(len(figures(columns["blocked_s"], name))), *shown, *over]
