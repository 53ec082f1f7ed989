"""Build the parts of a run from its config: the one file that maps each config key to its class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from everstep.compose import plain
from everstep.config import Dtype, Node, RunConfig
from everstep.errors import CheckpointError, ConfigError, DataError
from everstep.run_folder import EVENTS, RunFolder
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import candidates
from everstep.trainer.checkpoint.restore import Restored
from everstep.trainer.checkpoint.resume_trial import try_resume
from everstep.trainer.checkpoint.self_test import SelfTest
from everstep.trainer.checkpoint.weights import load_weights
from everstep.trainer.data.cache.on_node import node_cache
from everstep.trainer.data.dataset import TEST, Splits
from everstep.trainer.data.fetcher import Fetcher, MicrobatchRequest
from everstep.trainer.data.loader import Feed
from everstep.trainer.data.ordering.exclusion import Exclusion
from everstep.trainer.data.ordering.mixture import records_of
from everstep.trainer.data.ordering.order import SampleOrder, microbatches
from everstep.trainer.data.ordering.trace import order_sources, write_record
from everstep.trainer.data.randomness import seeded
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.distributed.model_factory import second_copy
from everstep.trainer.distributed.parallel import ParallelModel, parallelize
from everstep.trainer.evaluate import Evaluator
from everstep.trainer.loop import Parts, short_of_memory
from everstep.trainer.optim import WeightEma, build_optimizer, group_facts, has_modes
from everstep.trainer.plugins import check_allowed, instantiate
from everstep.trainer.reporting.console import open_display, short
from everstep.trainer.reporting.flops import count_flops, peak_flops
from everstep.trainer.reporting.reporter import Hook, Reporter
from everstep.trainer.reporting.sinks import Guarded, JsonLines, Sink, open_sinks
from everstep.trainer.reporting.startup_timing import StartupTimer
from everstep.trainer.state.buffer_sync import BufferSync
from everstep.trainer.state.model_state import check_model, has_custom_state
from everstep.trainer.state.plugin_state import hook_keys
from everstep.trainer.state.train_state import LossScale, Progress, TrainState
from everstep.trainer.state.trainable import Trainable
from everstep.trainer.step import Stepper
from everstep.trainer.stop import Stop
from everstep.trainer.task import Task

LOG = logging.getLogger("everstep")
PLUGINS = ("task", "model", "data", "optimizer", "hooks")


@dataclass(frozen=True)
class Start:
    """Facts of this attempt that are known before anything is built."""

    folder: RunFolder
    attempt: int
    laps: StartupTimer
    micro_batch: int | None = None
    """The microbatch that the previous attempt asked for when it ran out of memory."""


def build(run: RunConfig, start: Start, mesh: Mesh, stop: Stop) -> Parts:
    """Make all parts and restore the newest checkpoint.

    Raises:
        EverstepError: a ConfigError, DataError or CheckpointError whose message is one line.
    """
    check_plugins(run)
    splits = load_data(run, mesh)
    task = build_task(run)
    fresh = mesh.decide(lambda: not any(True for _ in candidates(start.folder)))
    hooks: list[Hook] = [instantiate(node, f"hooks[{n}]", run.plugins) for n, node in enumerate(run.hooks)]
    model = parallelize(task.model, mesh, run.parallel, run.precision, fresh=fresh, seed=run.seed)
    state = _state(run, model, mesh, fresh, {"task": task, **dict(zip(hook_keys(run.hooks), hooks, strict=True))})
    copy = partial(self_test, run, task, model.model, mesh) if fresh and run.checkpoint.self_test else None
    checkpoints = Checkpointer(run, start.folder, start.attempt, mesh, state, digest_of(splits), copy)
    _check_comes_back(state, copy)
    start.laps.end("build")
    restored = checkpoints.restore()
    start.laps.end("load")
    wanted = (run.micro_batch, start.micro_batch, state.progress.micro_batch)
    state.progress.micro_batch = min(size for size in wanted if size)
    train, held_out = gathers(run, splits)
    records = records_of(splits.train)
    order = SampleOrder.of_run(run, order_sources(records))
    mesh.decide(lambda: write_record(start.folder, records))
    feed = Feed(train, order, run.loader, state.progress.micro_batch, mesh.rank, mesh.world, mesh.device)
    step = Stepper(run, state, model, task, stop, checkpoints.poll)
    evaluate = Evaluator(run, state, model, task, held_out, stop)
    journal = open_journal(run, start, mesh, state.progress.step)
    journal.unit = getattr(task, "unit", "items")
    journal.checkpoint_step = restored.step if restored else 0
    parts = Parts(state, feed, step, evaluate, checkpoints, journal, hooks)
    batch = _first_batch(run, parts)
    _rehearse(run, parts, batch)
    if copy is not None and restored is None:
        try_resume(partial(_trainable, run, model), model.model, batch, mesh)
    _announce(run, parts, restored)
    start.laps.end("build")
    return parts


def check_plugins(run: RunConfig) -> None:
    for key in PLUGINS:
        check_allowed(getattr(run, key), key, run.plugins)


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
    return splits


def _splits(run: RunConfig) -> Splits:
    node = _needed(run.data, "data")
    with seeded(run.seed):  # a random split, say, is the same on all ranks and at every start
        found = instantiate(node, "data", run.plugins, cache=partial(node_cache, run.loader))
    return found if isinstance(found, Splits) else Splits(found)


def gathers(run: RunConfig, splits: Splits) -> tuple[Fetcher, dict[str, Fetcher]]:
    """Return the gather function of the training set, and those of the evaluation sets by name."""
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
    for gather in (train, *sets.values()):
        gather.check_repeats()
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


def _needed(node: Node | None, key: str) -> Node:
    if node is None:
        raise ConfigError(f"{key}=null: nothing to train; give experiment=NAME or {key}=NAME")
    return node


def _state(run: RunConfig, model: ParallelModel, mesh: Mesh, fresh: bool, plugins: Mapping[str, object]) -> TrainState:
    check_model(model.model)
    optimizer = build_optimizer(_needed(run.optimizer, "optimizer"), model.model, run.plugins)
    if fresh and run.init_from is not None:
        LOG.info("weights from %s", load_weights(run.init_from, model.model, mesh, run.init_match))
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


def self_test(run: RunConfig, task: Task, live: nn.Module, mesh: Mesh) -> SelfTest:
    """Return the self-test of the state: a second model and optimizer that a saved state is restored into."""
    model = second_copy(task.model, live, mesh, run.parallel, run.precision, run.seed)
    optimizer = build_optimizer(_needed(run.optimizer, "optimizer"), model, run.plugins)
    state = TrainState(model, optimizer, Progress())
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return SelfTest(state)


def _check_comes_back(state: TrainState, make: Callable[[], SelfTest] | None) -> None:
    """Check that the state can be saved and, with a custom `load_state_dict`, restored."""
    try:
        packed = state.pack()
        if make is not None and has_custom_state(state.model):
            make().round_trip(packed)
    except CheckpointError as error:
        raise ConfigError(f"the run's state cannot be saved: {error}") from error


def open_journal(run: RunConfig, start: Start, mesh: Mesh, step: int) -> Reporter:
    """Return the journal of this rank; `step` is the step from which this attempt resumes."""
    display = open_display(run.log, mesh.is_main)
    sinks: list[Sink] = []
    mesh.decide(lambda: sinks.extend(open_sinks(run, start.folder, start.attempt, plain(run), step)))
    if not mesh.is_main:
        return Reporter(run, start.folder, display, (), None, start.laps)
    file = JsonLines(start.folder.storage, start.folder.attempt(start.attempt, EVENTS))
    events = Guarded(EVENTS, file)
    journal = Reporter(run, start.folder, display, sinks, events, start.laps)
    journal.world, journal.device, journal.peak = mesh.world, mesh.device, peak_flops(mesh.device)
    return journal


def _trainable(run: RunConfig, model: ParallelModel, others: Iterable[nn.Module]) -> Trainable:
    return Trainable(run, build_task(run), model.mesh.device, others, model.autocast)


def _first_batch(run: RunConfig, parts: Parts) -> dict[str, Tensor]:
    """Return the first samples of the dataset, as many as a microbatch has, on the device."""
    ids = np.arange(min(parts.feed.micro_batch, parts.feed.order.samples))
    found = parts.feed.gather(MicrobatchRequest(ids, np.zeros_like(ids), run.steps))
    return {name: value.to(parts.feed.device) for name, value in found.batch.items()}


def _rehearse(run: RunConfig, parts: Parts, batch: Mapping[str, Tensor]) -> None:
    """Run one pass that changes nothing, before the first step of an attempt.

    DDP orders its buckets by its first backward pass. A resumed run must sum gradients in the same order as a run that
    was never interrupted, so this pass fixes the order before the first step of both.
    """
    items: list[int] = []
    try:
        if parts.journal.peak and run.parallel.compile is None:
            flops = count_flops(lambda: items.append(parts.step.rehearse(batch)))
            parts.journal.flops_per_item = flops / max(1, items[0])
        elif parts.step.parallel.mesh.world > 1:
            parts.step.rehearse(batch)
        parts.evaluate.rehearse()
    except torch.OutOfMemoryError as error:
        raise short_of_memory(parts) from error


def _too_small_a_cache(run: RunConfig, feed: Feed) -> str | None:
    """Return a warning if the node cache is too small to avoid repeated downloads of shards, else None."""
    dataset, shards = feed.gather.dataset, sum(len(source.rows) for source in feed.order.sources)
    room, size = getattr(dataset, "room_bytes", None), getattr(dataset, "sample_bytes", 0.0) * len(feed.gather.dataset)
    window = min(run.order.window or shards, shards)
    if room is None or window * size / shards <= room:
        return None
    fitting, enough_gb = int(room * shards / size), 2 * window * size / shards / 1e9
    return (
        f"half of the cache holds {fitting} shards, order.window={window} needs as many at hand: shards will be "
        f"fetched again and again; give loader.cache_gb={enough_gb:.3g}, or a new run order.window={fitting}"
    )


def _announce(run: RunConfig, parts: Parts, restored: Restored | None) -> None:
    mesh, feed = parts.step.parallel.mesh, parts.feed
    parameters = sum(p.numel() for p in parts.state.model.parameters())
    trained = sum(p.numel() for p in parts.state.model.parameters() if p.requires_grad)
    slots = len(microbatches(run.global_batch, feed.micro_batch, mesh.rank, mesh.world))
    epochs = run.steps * run.global_batch / feed.order.samples
    facts = {
        "parameters": short(parameters) + (f", {short(trained)} of them trained" if trained < parameters else ""),
        "world": f"{mesh.world} × {mesh.device.type}, {run.parallel.kind.value}, {run.precision.dtype.value}",
        "batch": f"{run.global_batch} samples = {slots} × {feed.micro_batch} on each process",
        "data": f"{short(feed.order.samples)} samples, {epochs:.3g} epochs in {run.steps} steps",
        **group_facts(parts.state.optimizer, parts.state.model),
        "folder": parts.checkpoints.folder.url,
        "starts from": "new weights" if restored is None else f"step {restored.step} ({restored.why})",
    }
    if restored is None and run.init_from is not None:
        facts["starts from"] = f"the weights of {run.init_from}"
    if (small := _too_small_a_cache(run, feed)) is not None:
        parts.journal.event("small_cache", small)
    for passed in restored.walked_past if restored else ():
        parts.journal.event("walked_past", f"damaged checkpoint set aside: {passed}")
    if model_units := parts.step.parallel.units:
        facts["units"] = model_units
    parts.journal.event("started", step=parts.state.progress.step, world=mesh.world, facts=facts)
    parts.journal.start(f"{run.run}, attempt {parts.checkpoints.attempt}", facts, parts.state.progress.step)
