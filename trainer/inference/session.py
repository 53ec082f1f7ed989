"""Session: a run's task and data, and its state as a checkpoint has it, on the ranks of one command."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from everstep.config import ParallelKind, RunConfig, Weights
from everstep.errors import CheckpointError, ConfigError, printable
from everstep.frozen_config import fixed_digest, thaw
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
from everstep.trainer.checkpoint.manifest import CheckpointRef, Committed
from everstep.trainer.checkpoint.read import DamagedError
from everstep.trainer.checkpoint.restore import choose
from everstep.trainer.checkpoint.signature import binding_fault
from everstep.trainer.data.dataset import TEST, Splits
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.rng_discovery import own_generators
from everstep.trainer.distributed.mesh import Mesh, form, join
from everstep.trainer.distributed.parallel import ParallelModel, parallelize
from everstep.trainer.evaluate import averaged, evaluating
from everstep.trainer.random_state import microbatch_seed, seed_generators, seed_own
from everstep.trainer.start import checked_config
from everstep.trainer.state.plugin_state import hook_keys
from everstep.trainer.state.train_state import TrainState
from everstep.trainer.state.trainable_copy import MOST_OBJECTS
from everstep.trainer.task import Task
from everstep.trainer.torchmetrics_states import place_objects

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
    data_digest: str
    """Digest of the data that it was trained on."""

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def batch(self) -> int:
        """Samples of a pass: as in training, where memory may have run out with more."""
        micro_batch = self.state.progress.micro_batch or self.run.micro_batch
        return min(self.run.evaluate.batch or micro_batch, micro_batch)

    @cached_property
    def _generators(self) -> Any:
        return own_generators(self.model.model, self.task, most=MOST_OBJECTS)

    def seed(self, index: int) -> None:
        """Seed all generators for the pass of this number, whichever rank makes it."""
        seed = microbatch_seed(self.run.seed, 0, index)
        seed_generators(seed, self.mesh.device)
        if self._generators:
            seed_own(self._generators, seed)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode, with the weights that the run evaluates with, and no gradients."""
        average = self.state.average if self.run.evaluate.weights is Weights.ema else None
        try:
            with evaluating(self.model.module, self.state.optimizer), averaged(average):
                yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"evaluate.batch={self.batch}: out of memory; give a smaller one") from error


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

    Of damaged checkpoints `last` takes the newest that is whole, and prints a line about each other.

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
    faults = []
    for packed in mesh.decide(lambda: _candidates(run_url, which)):
        folder, found = RunFolder(packed["folder"]), unpack_ref(packed)
        try:
            source = open_checkpoint(folder.storage, found, mesh)
            load_state(state, source, source.manifest.data_digest, mesh)
        except DamagedError as error:
            faults.append(f"{found.path}: {error}")
            if mesh.is_main and which == LAST:
                print(printable(f"damaged, so an older one is used: {faults[-1]}"), file=sys.stderr)
            continue
        return Session(run, mesh, task, model, state, join_url(folder.url, found.path), source.manifest.data_digest)
    raise CheckpointError(f"{run_url}@{which}: no checkpoint can be read ({'; '.join(faults) or 'none was written'})")


def _candidates(url: str, which: str) -> list[dict[str, Any]]:
    """Return the checkpoints that `which` allows as JSON, the newest first."""
    all_of_them = list(choose(join_url(url, BEST) if which == BEST else url))
    found = [each for each in all_of_them if not which.isdigit() or each[1].step == int(which)]
    if not found and which.isdigit():
        steps = sorted({checkpoint.step for _, checkpoint in all_of_them})
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"{url}@{which}: there is no such checkpoint; there are {there}")
    for folder, checkpoint in found:
        _check_signed_config(folder, checkpoint)
    return [{"folder": folder.url, **pack_ref(checkpoint)} for folder, checkpoint in found]


def _check_signed_config(folder: RunFolder, found: CheckpointRef) -> None:
    """Raise CheckpointError if the run's config is not the one that was signed with the checkpoint."""
    recorded = thaw(folder.storage.read(CONFIG))
    if not isinstance(found, Committed) or recorded.resume.allow:
        return
    if fault := binding_fault(found.manifest.signature, None, fixed_digest(recorded)):
        raise CheckpointError(f"{folder.url}/{found.path}: {fault}; put the old {CONFIG} back")


def load_sets(run: RunConfig, mesh: Mesh, on: str, or_train: bool = False) -> tuple[Splits, dict[str, Fetcher]]:
    """Return the data, and fetchers of the sets that `on` names: validation, test, train or a set's name.

    `or_train` takes the training set of data without a validation set.

    Raises:
        ConfigError: the data has no such set.
    """
    splits = load_data(run, mesh)
    sets: dict[str, Fetcher] = {}
    wanted = TRAIN if or_train and on == VALIDATION and not splits.held_out() else on
    mesh.together(lambda: sets.update(_sets(run, splits, wanted)))
    return splits, sets


def _sets(run: RunConfig, splits: Splits, on: str) -> dict[str, Fetcher]:
    train, held_out = fetchers(run, splits)
    named = {name: found for name, found in held_out.items() if name != TEST}
    if on == VALIDATION and named:
        return named
    if on == TRAIN:
        return {TRAIN: replace(train, augment=None)}
    if on and on in held_out:
        return {on: held_out[on]}
    there = [*([VALIDATION] if named else []), *(name for name in held_out if name), TRAIN]
    raise ConfigError(f"--on {on}: the data has no such set; there are {', '.join(there)}; choose by --on")
