"""`python -m everstep.trainer check`: a run's parts at its number of processes, without training.

The model is built without memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everstep.compose import compose
from everstep.config import ParallelKind, RunConfig, steps_of
from everstep.errors import ConfigError, EverstepError
from everstep.frozen_config import thaw
from everstep.process_setup import use_own_cache

if TYPE_CHECKING:
    from torch import Tensor

    from everstep.trainer.preflight.memory_estimate import Footprint

TRACEBACK = "EVERSTEP_TRACEBACK"


@dataclass
class Findings:
    """Problems of a run, and facts about it."""

    problems: list[str] = field(default_factory=list)
    memory: dict[int, Footprint] = field(default_factory=dict)
    """Number of processes → memory of each of them."""
    data: str = ""
    length: str = ""
    """Epochs, with their number of steps if the data was read."""
    notes: list[str] = field(default_factory=list)

    def facts(self, run: RunConfig, brief: bool) -> Iterator[str]:
        """Yield facts about the run; `brief` leaves out the tables."""
        kind = run.parallel.kind.value
        counts = {seen.parameters for seen in self.memory.values()}
        if counts and not brief and not self.problems:
            yield f"fine: {max(counts):,} parameters, {self.length or run.steps} steps of {run.global_batch}"
        for world, seen in self.memory.items():
            yield from [seen.line(world, kind)] if brief else seen.table(world, kind)
        if self.data and not brief:
            yield self.data
        yield from self.notes

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Record the error of one part, so that the other parts are checked too."""
        try:
            yield
        except EverstepError as error:
            self.problems.append(str(error))
        except Exception as error:
            if os.environ.get(TRACEBACK) == "1":
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.problems.append(f"{what}: {said} ({TRACEBACK}=1 shows where)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/run.yaml")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")
    parser.add_argument("--frozen", action="store_true", help="a resolved config.yaml comes on standard input")
    parser.add_argument(
        "--world",
        type=int,
        action="append",
        metavar="N",
        help="processes that the run will have (1); may be given again",
    )
    parser.add_argument("--brief", action="store_true", help="the memory in one line")
    parser.add_argument("--no-data", action="store_true", help="the data is where the run will be, and not here")


def check(options: argparse.Namespace) -> int:
    """Check everything, then print the problems, a line each; exit code 2 if there are any."""
    run = _config(options)
    use_own_cache()
    found = examine(run, *(options.world or [1]), data=not options.no_data)
    if not (options.brief and found.problems):
        for fact in found.facts(run, options.brief):
            print(fact)
    for problem in found.problems:
        print(f"error: {problem}", file=sys.stderr)
    return ConfigError.exit_code if found.problems else 0


def _config(options: argparse.Namespace) -> RunConfig:
    if not options.frozen:
        return compose(options.overrides, options.config_dir).run
    if options.overrides:
        raise ConfigError(f"--frozen takes no overrides ({options.overrides[0]}); the config comes as it is")
    return thaw(sys.stdin.buffer.read().decode())


def examine(run: RunConfig, *worlds: int, data: bool = True) -> Findings:
    """Build the parts of a run, the model at each number of processes; `data` reads a first batch too."""
    from everstep.trainer.build import plugin_nodes
    from everstep.trainer.plugins import check_allowed
    from everstep.trainer.schedule import curve_of

    found = Findings(length=run.steps_given or "")
    for key, node in plugin_nodes(run).items():
        with found.of(key):
            check_allowed(node, key, run.plugins)
    if found.problems:  # nothing of it may be imported
        return found
    with found.of("parallel"):
        for world in worlds:
            run.parallel.check_world(world)
    if not found.problems:
        _look_at_model(run, worlds, found)
    with found.of("schedule"):
        curve_of(run.schedule, run.plugins)
    with found.of("hooks"):
        _build_hooks(run)
    if data:
        _look_at_data(run, found, max(worlds))
    found.notes += _idle(run, max(worlds))
    found.problems = list(dict.fromkeys(found.problems))  # a problem at each number of processes is reported once
    return found


def _look_at_model(run: RunConfig, worlds: Sequence[int], found: Findings) -> None:
    from everstep.trainer.build import build_task, model_of
    from everstep.trainer.preflight.memory_estimate import footprint, pretended

    with found.of("task"):
        task = build_task(run)
        if run.optimizer is None:
            raise ConfigError("optimizer=null: give optimizer=NAME")
        for world in worlds:
            with found.of("model"), pretended(run.parallel, world) as mesh:
                found.memory[world] = footprint(run, model_of(run, task), mesh)


def _build_hooks(run: RunConfig) -> None:
    from everstep.trainer.plugins import instantiate

    for number, node in enumerate(run.hooks):
        instantiate(node, f"hooks[{number}]", run.plugins)


def _look_at_data(run: RunConfig, found: Findings, world: int) -> None:
    with found.of("data"):
        batches, samples, held_out, tokens = _first_batches(run)
        if run.steps_given is not None:
            found.length = f"{run.steps_given} = {steps_of(run.steps_given, samples, run.global_batch, tokens)}"
        batch = batches[0]
        shapes = ", ".join(f"{name} {list(value.shape)} {str(value.dtype)[6:]}" for name, value in batch.items())
        found.data = f"data: {samples:,} samples; the first microbatch is {shapes}"
        if not found.problems:
            found.notes += _first_step(run, batches, found, world, held_out)


def _first_step(
    run: RunConfig, batches: Sequence[Mapping[str, Tensor]], found: Findings, world: int, held_out: bool
) -> Sequence[str]:
    from everstep.trainer.preflight.first_step import try_first_step

    return try_first_step(run, batches, max(seen.parameters for seen in found.memory.values()), world, held_out)


def _first_batches(run: RunConfig) -> tuple[list[dict[str, Tensor]], int, bool, int | None]:
    """Return microbatches as training reads them, samples, if any are held out, tokens of a sample.

    The first use may prepare a dataset.
    """
    import numpy as np
    import torch

    from everstep.rank_env import RankInfo
    from everstep.trainer.build import fetchers, load_data
    from everstep.trainer.checkpoint.resume_trial import LAST
    from everstep.trainer.data.fetcher import MicrobatchRequest
    from everstep.trainer.data.tokens import tokens_per_sample
    from everstep.trainer.distributed.mesh import Mesh

    splits = load_data(run, Mesh(RankInfo(), torch.device("cpu")))
    train, _ = fetchers(run, splits)
    samples = len(splits.train)
    size = min(run.micro_batch, samples)
    ids = [(number * size + np.arange(size)) % samples for number in range(LAST)]
    batches = [train(MicrobatchRequest(each, np.zeros_like(each), 1)).batch for each in ids]
    return batches, samples, splits.validation is not None, tokens_per_sample(splits)


def _idle(run: RunConfig, world: int) -> Sequence[str]:
    microbatches = -(-run.global_batch // run.micro_batch)
    if run.parallel.kind is ParallelKind.single or microbatches >= world:
        return ()
    return (
        f"note: a step has {microbatches} microbatches for {world} processes, so {world - microbatches} are idle; "
        "make global_batch larger or micro_batch smaller",
    )
