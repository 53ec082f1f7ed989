"""Session: a run's task and data, and its state as a checkpoint has it, on the ranks of one command."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from everstep.config import ParallelKind, RunConfig, Weights
from everstep.errors import CheckpointError, ConfigError
from everstep.rank_env import RankInfo
from everstep.run_folder import CONFIG, RunFolder
from everstep.storage import join_url, open_storage
from everstep.trainer.build import (
    build_task,
    check_plugins,
    fetchers,
    initial_state,
    load_data,
    make_hooks,
    model_of,
    parallel_of,
)
from everstep.trainer.checkpoint.load import load_state, open_checkpoint, pack_ref, unpack_ref
from everstep.trainer.checkpoint.manifest import Committed, find_fault
from everstep.trainer.checkpoint.restore import choose
from everstep.trainer.data.dataset import TEST, Splits
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.distributed.mesh import Mesh, form, join
from everstep.trainer.distributed.parallel import ParallelModel, parallelize
from everstep.trainer.evaluate import averaged, evaluating
from everstep.trainer.metric_states import place_objects
from everstep.trainer.start import checked_config
from everstep.trainer.state.plugin_state import hook_keys
from everstep.trainer.state.train_state import TrainState
from everstep.trainer.task import Task

LAST, BEST = "last", "best"
VALIDATION, TRAIN = "validation", "train"


@dataclass(frozen=True)
class Session:
    """The parts of a run that evaluate and predict."""

    run: RunConfig
    mesh: Mesh
    task: Task
    model: ParallelModel
    state: TrainState
    checkpoint: str
    """URL of the checkpoint."""

    @property
    def step(self) -> int:
        return self.state.progress.step

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode, with the weights that the run evaluates with, and no gradients."""
        average = self.state.average if self.run.evaluate.weights is Weights.ema else None
        with evaluating(self.model.module, self.state.optimizer), averaged(average):
            yield


def join_ranks(run: RunConfig) -> Mesh:
    """Return the mesh of this command's processes; models are sharded over them if the run shards."""
    place = RankInfo.from_environment()
    place.check_world()
    store = None
    if place.world > 1:
        store = join(place, timeout_s=float(os.environ.get("EVERSTEP_JOIN_TIMEOUT_S", "300")))
    return form(place, store, layout(run, place.world).parallel, run.group_timeout_s)


def layout(run: RunConfig, world: int) -> RunConfig:
    """Return the config for any number of processes: whatever the run used, none of it changes a result."""
    sharded = run.parallel.kind in (ParallelKind.fsdp, ParallelKind.hsdp) and world > 1
    kind = ParallelKind.fsdp if sharded else ParallelKind.ddp if world > 1 else ParallelKind.single
    return replace(run, parallel=replace(run.parallel, kind=kind, shard=None, compile=None))


def read_config(url: str, options: argparse.Namespace) -> RunConfig:
    """Return the config that a folder holds, checked against the command line."""
    try:
        return checked_config(open_storage(url).read(CONFIG), options)
    except FileNotFoundError as error:
        raise ConfigError(f"{url} has no {CONFIG}") from error


def open_session(run: RunConfig, mesh: Mesh, run_url: str, which: str) -> Session:
    """Build the run's task, model and state, and load the checkpoint `which`: last, best or a step.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigError: a part of the config is invalid.
    """
    run = layout(run, mesh.world)
    check_plugins(run)
    task = build_task(run)
    place_objects(task, mesh.device)
    hooks = dict(zip(hook_keys(run.hooks), make_hooks(run), strict=True))
    model = parallelize(model_of(run, task), mesh, parallel_of(run), run.precision, fresh=False, seed=run.seed)
    state = initial_state(run, model, mesh, False, {"task": task, **hooks})
    packed = mesh.decide(lambda: _choose(run_url, which))
    folder, found = RunFolder(packed["folder"]), unpack_ref(packed)
    source = open_checkpoint(folder.storage, found, mesh)
    load_state(state, source, source.manifest.data_digest, mesh)
    return Session(run, mesh, task, model, state, join_url(folder.url, found.path))


def _choose(url: str, which: str) -> dict[str, Any]:
    """Return the checkpoint as JSON; every file of it is verified."""
    faults = []
    for folder, found in choose(join_url(url, BEST) if which == BEST else url):
        if which.isdigit() and found.step != int(which):
            continue
        fault = "" if isinstance(found, Committed) else found.why
        fault = fault or find_fault(folder.storage, found.path, found.manifest.files.items())  # type: ignore[union-attr]
        if not fault:
            return {"folder": folder.url, **pack_ref(found)}
        faults.append(f"{found.path}: {fault}")
        if which != LAST:
            break
    if not faults and which.isdigit():
        steps = sorted({found.step for _, found in choose(url)})
        raise ConfigError(
            f"{url}@{which}: there is no such checkpoint; there are {', '.join(map(str, steps)) or 'none'}"
        )
    raise CheckpointError(f"{url}@{which}: no checkpoint can be read ({'; '.join(faults) or 'none was written'})")


def load_sets(run: RunConfig, mesh: Mesh, on: str) -> tuple[Splits, dict[str, Fetcher]]:
    """Return the data, and fetchers of the sets that `on` names: validation, test, train or a set's name.

    Raises:
        ConfigError: the data has no such set.
    """
    splits = load_data(run, mesh)
    train, held_out = fetchers(run, splits)
    plain = replace(train, augment=None)
    named = {name: found for name, found in held_out.items() if name != TEST}
    if on == VALIDATION and named:
        return splits, named
    if on == TRAIN:
        return splits, {TRAIN: plain}
    if on in held_out:
        return splits, {on: held_out[on]}
    there = [*([VALIDATION] if named else []), *(name for name in held_out if name), TRAIN]
    raise ConfigError(f"--on {on}: the data has no such set; there are {', '.join(there)}")


def close(mesh: Mesh) -> None:
    """Leave the group of ranks once all are done."""
    if mesh.world > 1:
        torch.distributed.barrier()
