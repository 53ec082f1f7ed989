"""Build the parts of a run from its config: the one file that maps each config key to its class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from everstep import frozen_config
from everstep.config import UNRESOLVED, Dtype, Goal, Node, ParallelConfig, RunConfig
from everstep.dataset.tags import policy_fault
from everstep.errors import CheckpointError, ConfigError, DataError
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import ManifestFacts, candidates
from everstep.trainer.checkpoint.self_test import SelfTest
from everstep.trainer.checkpoint.signature import Binding
from everstep.trainer.checkpoint.weights import load_weights
from everstep.trainer.data.cache import node_cache
from everstep.trainer.data.dataset import TEST, Splits
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.ordering.exclusion import Exclusion
from everstep.trainer.data.ordering.mixture import place_of, sources_of, tags_of
from everstep.trainer.data.randomness import seeded
from everstep.trainer.data.tokens import tokens_per_sample
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.model_factory import apart, batch_dtype, second_copy, seeded_model
from everstep.trainer.distributed.parallel import ParallelModel, parallelize
from everstep.trainer.hooks import Hook
from everstep.trainer.optim import WeightEma, build_optimizer, has_modes
from everstep.trainer.optimizers.alternating import turns_of
from everstep.trainer.optimizers.matched import ALTERNATING
from everstep.trainer.param_groups import frozen_model
from everstep.trainer.plugins import TARGET, check_allowed, instantiate
from everstep.trainer.schedule import curve_of
from everstep.trainer.start import Start
from everstep.trainer.state.buffer_sync import BufferSync
from everstep.trainer.state.model_state import check_model, has_custom_state
from everstep.trainer.state.plugin_state import hook_keys
from everstep.trainer.state.train_state import LossScale, Progress, TrainState
from everstep.trainer.state.trainable_copy import Trainable
from everstep.trainer.task import Task
from everstep.trainer.task_calls import check_takes_turns
from everstep.trainer.torchmetrics_states import place_objects

LOG = logging.getLogger("everstep")


@dataclass(frozen=True)
class Built:
    """Parts of a run that do not depend on its position; the state is that before the first step."""

    run: RunConfig
    """The config, with epochs or tokens as a number of steps."""
    task: Task
    splits: Splits
    hooks: list[Hook]
    model: ParallelModel
    state: TrainState
    checkpoints: Checkpointer
    self_test: Callable[[], SelfTest] | None
    """Factory of a second copy; None on a resume, and where the self-test is off."""


def build(run: RunConfig, start: Start, mesh: Mesh) -> Built:
    """Construct data, task, model, optimizer and checkpointer; restore nothing.

    Raises:
        EverstepError: a ConfigError, DataError or CheckpointError whose message is one line.
    """
    check_plugins(run)
    splits = load_data(run, mesh)
    if run.steps == UNRESOLVED:
        known = len(splits.train), tokens_per_sample(splits)
        steps = mesh.decide(lambda: frozen_config.resolve_steps(run, start.folder, *known))
        run = replace(run, steps=steps)
    task = build_task(run)
    place_objects(task, mesh.device)
    fresh = mesh.decide(lambda: not any(True for _ in candidates(start.folder)))
    hooks = make_hooks(run)
    model = parallelize(model_of(run, task), mesh, parallel_of(run), run.precision, fresh=fresh, seed=run.seed)
    state = initial_state(
        run, model, mesh, fresh, {"task": task, **dict(zip(hook_keys(run.hooks), hooks, strict=True))}
    )
    copy = partial(self_test, run, task, model.model, mesh) if fresh and run.checkpoint.self_test else None
    facts = _manifest_facts(run, start.attempt, digest_of(splits))
    maximise = run.evaluate.goal is Goal.max
    checkpoints = Checkpointer(run.checkpoint, facts, start.folder, mesh, state, maximise=maximise, self_test=copy)
    _check_comes_back(state, copy)
    start.laps.end("build")
    return Built(run, task, splits, hooks, model, state, checkpoints, copy)


def plugin_nodes(run: RunConfig) -> dict[str, object]:
    """Return the nodes of plug-ins by their key."""
    nodes = {key: getattr(run, key) for key in ("task", "model", "data", "optimizer", "hooks")}
    return {**nodes, "schedule": run.schedule.node}


def check_plugins(run: RunConfig) -> None:
    for key, node in plugin_nodes(run).items():
        check_allowed(node, key, run.plugins)
    check_allowed(run.log.sinks, "log.sinks", run.plugins)
    curve_of(run.schedule, run.plugins)


def load_data(run: RunConfig, mesh: Mesh) -> Splits:
    """Return the splits of the `data` node.

    Rank 0 goes first, since the first use may have to prepare the data.
    """
    built: list[Splits] = []

    def first() -> str:
        built.append(_splits(run))
        return digest_of(built[0])

    digest = mesh.decide(first)
    splits = built[0] if built else _splits(run)
    found = mesh.gather(digest_of(splits))
    if any(other != digest for other in found):
        raise DataError(f"data: the ranks see different data (digests {', '.join(d[:12] for d in sorted(set(found)))})")
    if len(splits.train) < 1:
        raise DataError("data: the training set is empty")
    _check_policy(run, splits)
    return splits


def _check_policy(run: RunConfig, splits: Splits) -> None:
    """Raise ConfigError if `policy` does not allow the tags of a dataset that the run uses."""
    for source in (part for found in splits.all() for part in sources_of(found)):
        if fault := policy_fault(run.policy.allow_tags, place_of(source), tags_of(source)):
            raise ConfigError(fault)


def _splits(run: RunConfig) -> Splits:
    node = _needed(run.data, "data")
    with seeded(run.seed):  # a random split, say, is the same on all ranks and at every start
        found = instantiate(node, "data", run.plugins, cache=partial(node_cache, run.loader))
    return found if isinstance(found, Splits) else Splits(found)


def fetchers(run: RunConfig, splits: Splits) -> tuple[Fetcher, dict[str, Fetcher]]:
    """Return the fetcher of the training set, and those of the evaluation sets by name."""
    train = Fetcher(
        splits.train,
        run.seed,
        splits.decode,
        splits.collate,
        splits.augment,
        run.bad_samples,
        Exclusion(run.exclude),
        run.loader.workers,
    )
    held_out = splits.held_out() | ({TEST: splits.test} if splits.test is not None else {})
    sets = {
        name: replace(train, dataset=dataset, augment=None, excluded=Exclusion()) for name, dataset in held_out.items()
    }
    for fetcher in (train, *sets.values()):
        fetcher.check_repeats()
    return train, sets


def digest_of(splits: Splits) -> str:
    named = [f"{name}={found.digest}" if name else found.digest for name, found in splits.held_out().items()]
    test = f"/{splits.test.digest}" if splits.test is not None else ""
    return hashlib.sha256(f"{splits.train.digest}/{','.join(named)}{test}".encode()).hexdigest()


def build_task(run: RunConfig) -> Task:
    """Return the task, with a factory for the `model` node if its constructor has a parameter `model`."""
    node, runtime = _needed(run.task, "task"), {}
    if run.model is not None:
        runtime["model"] = model_factory(run.model, run.plugins)
    task: Task = instantiate(node, "task", run.plugins, **runtime)
    for method in ("model", "loss", "evaluate"):
        if not callable(getattr(task, method, None)):
            raise ConfigError(f"task._target_={node['_target_']!r} has no method {method!r}; see trainer/task.py")
    return task


def model_factory(node: Node, plugins: Iterable[str]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = instantiate(node, "model", plugins)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model._target_={node['_target_']!r} gives a {type(model).__name__}, not an nn.Module")
        return model

    return make


def model_of(run: RunConfig, task: Task) -> Callable[[], nn.Module]:
    """Return the factory of the model, with the parameters frozen that `optimizer.groups` freezes."""
    return partial(frozen_model, task.model, run.optimizer or {})


def parallel_of(run: RunConfig) -> ParallelConfig:
    """Return the parallelism, in which DDP looks for unused parameters if optimizers take turns."""
    if (run.optimizer or {}).get(TARGET) != ALTERNATING:
        return run.parallel
    return replace(run.parallel, find_unused=True)


def _needed(node: Node | None, key: str) -> Node:
    if node is None:
        raise ConfigError(f"{key}=null: nothing to train; give experiment=NAME or {key}=NAME")
    return node


def make_hooks(run: RunConfig) -> list[Hook]:
    return [instantiate(node, f"hooks[{n}]", run.plugins) for n, node in enumerate(run.hooks)]


def initial_state(
    run: RunConfig, model: ParallelModel, mesh: Mesh, fresh: bool, plugins: Mapping[str, object]
) -> TrainState:
    """Return the state before the first step; a checkpoint may be loaded into it."""
    check_model(model.model)
    optimizer = build_optimizer(_needed(run.optimizer, "optimizer"), model.model, run.plugins)
    check_takes_turns(plugins["task"], turns_of(optimizer) is not None)
    if fresh and run.init_from is not None:
        LOG.info("weights from %s", load_weights(run.init_from, model.model, mesh, run.init_match, run.init_map))
    precision, buffers = run.precision, BufferSync(model.model, mesh, run.parallel.buffers)
    if fresh:
        buffers.make_equal()
    scale = LossScale(precision.init_scale, precision.growth_interval, mesh.device)
    state = TrainState(
        model.model,
        optimizer,
        Progress(),
        WeightEma(model.model, run.ema) if run.ema is not None else None,
        scale if precision.dtype is Dtype.fp16 else None,
        buffers,
        plugins,
    )
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return state


def _manifest_facts(run: RunConfig, attempt: int, data_digest: str) -> ManifestFacts:
    binding = Binding(config=frozen_config.fixed_digest(run), may_differ=bool(run.resume.allow))
    return ManifestFacts(
        attempt,
        run.global_batch,
        run.parallel.kind.value,
        frozen_config.digest(run),
        data_digest,
        binding,
        Exclusion(run.exclude),
    )


def self_test(run: RunConfig, task: Task, live: nn.Module, mesh: Mesh) -> SelfTest:
    """Return the self-test of the state: a second model and optimizer that a saved state is restored into."""
    model = second_copy(model_of(run, task), live, mesh, run.parallel, run.precision, run.seed)
    optimizer = build_optimizer(_needed(run.optimizer, "optimizer"), model, run.plugins)
    state = TrainState(model, optimizer, Progress())
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return SelfTest(state)


def trainable(
    run: RunConfig,
    device: torch.device,
    others: Iterable[nn.Module] = (),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Trainable:
    """Return a copy of the run's task, model and optimizer that shares no memory with the models `others`."""
    task, node = build_task(run), _needed(run.optimizer, "optimizer")
    place_objects(task, device)
    model = apart(seeded_model(model_of(run, task), run.seed, run.precision, run.parallel), others).to(device)
    check_model(model)
    optimizer = build_optimizer(node, model, run.plugins)
    check_takes_turns(task, turns_of(optimizer) is not None)
    return Trainable(task, model, optimizer, device, run.seed, batch_dtype(run.precision), autocast)


def _check_comes_back(state: TrainState, make: Callable[[], SelfTest] | None) -> None:
    """Check that the state can be saved and, with a custom `load_state_dict`, restored."""
    try:
        packed = state.pack()
        if make is not None and has_custom_state(state.model):
            make().round_trip(packed)
    except CheckpointError as error:
        raise ConfigError(f"the run's state cannot be saved: {error}") from error
