"""Assembly of the parts of a run at its position: loader, step, evaluator, reporter; warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from everstep.config import RunConfig
from everstep.frozen_config import freeze, plain
from everstep.outcome import to_json_line
from everstep.run_folder import CONFIG, EVENTS
from everstep.trainer.build import Built, fetchers, trainable
from everstep.trainer.checkpoint.restore import Restored
from everstep.trainer.checkpoint.resume_trial import LAST, try_resume
from everstep.trainer.code_record import MODULES, loaded_code
from everstep.trainer.data.dataset import Prefetchable, mean_sample_bytes
from everstep.trainer.data.fetcher import MicrobatchRequest
from everstep.trainer.data.loader import Loader
from everstep.trainer.data.ordering.data_record import DataRecord, order_sources, write_record
from everstep.trainer.data.ordering.length_order import order_of
from everstep.trainer.data.ordering.mixture import records_of
from everstep.trainer.data.ordering.order import microbatches
from everstep.trainer.debug.overfit import RepeatingLoader
from everstep.trainer.debug.profiler import StepProfiler
from everstep.trainer.distributed.world_dependence import check_world, found_by, synced_statistics
from everstep.trainer.evaluate import Evaluator
from everstep.trainer.hooks import Hooks
from everstep.trainer.loop import Parts, short_of_memory
from everstep.trainer.optim import group_facts
from everstep.trainer.optimizers.alternating import turns_fact
from everstep.trainer.optimizers.muon_adamw import muon_fact
from everstep.trainer.reporting.console import open_display, short
from everstep.trainer.reporting.flops import count_flops
from everstep.trainer.reporting.media import MediaLog
from everstep.trainer.reporting.reporter import Outputs, Reporter, RunFacts
from everstep.trainer.reporting.sinks import Guarded, JsonLines, Sink
from everstep.trainer.reporting.trackers.opening import open_sinks
from everstep.trainer.reporting.trackers.sink_thread import SinkThread
from everstep.trainer.schedule import curve_of
from everstep.trainer.start import Start
from everstep.trainer.step import StepConfig, Stepper
from everstep.trainer.stop import Stop


def assemble(run: RunConfig, start: Start, built: Built, restored: Restored | None, stop: Stop) -> Parts:
    """Make the parts that depend on the restored position, warm them up, and print the facts of the run.

    Raises:
        EverstepError: a ConfigError or DataError whose message is one line.
    """
    state, mesh = built.state, built.model.mesh
    # A checkpoint keeps the size that memory running out had left, unless the user asks for another one by name.
    saved = None if "micro_batch" in run.resume.allow else state.progress.micro_batch
    state.progress.micro_batch = min(size for size in (run.micro_batch, start.micro_batch, saved) if size)
    train, held_out = fetchers(run, built.splits)
    records = records_of(built.splits.train, run.order.length_column)
    order = order_of(run, order_sources(records))
    mesh.decide(lambda: _record(run, start, records))
    made = partial(RepeatingLoader, run.debug.overfit) if run.debug.overfit else Loader
    loader = made(train, order, state.progress.micro_batch, mesh.place, mesh.device, run.loader)
    steps = run.schedule.over_steps or run.steps
    curve = curve_of(run.schedule, run.plugins)
    config = StepConfig(run.seed, run.global_batch, run.clip, steps, run.schedule, curve)

    def recorded(step: int) -> bool:
        return step % run.log.every == 0 or step == run.steps

    step = Stepper(config, state, built.model, built.task, stop, built.checkpoints.poll, recorded)
    evaluate = Evaluator(
        run.evaluate, state, built.model, built.task, held_out, stop, steps=run.steps, ahead_mb=run.loader.ahead_mb
    )
    hooks = Hooks(built.hooks, run.hooks, run.hooks_on_error, mesh.rank)
    step.asks = hooks.asks
    reporter = _reporter(run, start, built, restored)
    profiler = StepProfiler(run.debug, run.stop, start.folder, start.attempt, mesh.rank)
    parts = Parts(state, loader, step, evaluate, built.checkpoints, reporter, hooks, profiler)
    tried = built.self_test is not None and restored is None
    batches = [_batch(run, parts, number) for number in range(LAST if tried else 1)]
    flops_per_item = _warm_up(run, parts, batches[0])
    _check_world(run, parts, restored)
    if tried:
        copies = partial(trainable, run, mesh.device, autocast=built.model.autocast)
        try_resume(copies, built.model.model, batches, mesh)
    _announce(run, parts, restored, flops_per_item)
    start.laps.end("build")
    return parts


def _record(run: RunConfig, start: Start, records: Sequence[DataRecord]) -> None:
    """Record the data, and the attempt's config and code, by which its steps can be made again."""
    write_record(start.folder, records)
    folder, number = start.folder, start.attempt
    folder.storage.create(folder.attempt(number, CONFIG), freeze(run).encode())
    folder.storage.create(folder.attempt(number, MODULES), to_json_line(loaded_code(run.plugins)))


def _reporter(run: RunConfig, start: Start, built: Built, restored: Restored | None) -> Reporter:
    """Return the reporter of this rank; that of rank 0 alone has sinks and events to write to."""
    mesh, step = built.model.mesh, built.state.progress.step
    sinks: list[Sink] = []
    asked = (run.log, run.run, start.folder, start.attempt, plain(run), step, run.plugins)
    mesh.decide(lambda: sinks.extend(open_sinks(*asked)))
    file = JsonLines(start.folder.storage, start.folder.attempt(start.attempt, EVENTS)) if mesh.is_main else None
    events = Guarded(EVENTS, file) if file is not None else None
    figures = start.recorder.take if start.recorder is not None else dict
    trackers = [sink for sink in sinks if isinstance(sink, SinkThread)]
    media = MediaLog(start.folder, start.attempt, trackers, lambda: mesh.activity.mark.step) if mesh.is_main else None
    outputs = Outputs(open_display(run.log, mesh.is_main), sinks, events, trackers, figures, media)
    unit = getattr(built.task, "unit", "items")
    facts = RunFacts(run.steps, run.global_batch, run.log.every, run.evaluate.metric, unit)
    return Reporter(facts, start.folder, outputs, start.laps, mesh, restored.step if restored else 0)


def _batch(run: RunConfig, parts: Parts, number: int) -> dict[str, Tensor]:
    """Return the n-th microbatch of the dataset in the order of its ids, on the device."""
    size = min(parts.loader.micro_batch, parts.loader.order.samples)
    ids = (number * size + np.arange(size)) % parts.loader.order.samples
    found = parts.loader.fetcher(MicrobatchRequest(ids, np.zeros_like(ids), run.steps))
    return {name: value.to(parts.loader.device) for name, value in found.batch.items()}


def _warm_up(run: RunConfig, parts: Parts, batch: Mapping[str, Tensor]) -> float:
    """Run a pass of each turn that changes nothing, before an attempt's first step; return FLOPs per item.

    They are counted on rank 0 of a device whose peak is known, else 0.

    DDP orders its buckets by its first backward pass. A resumed run must sum gradients in the same order as a run that
    was never interrupted, so this pass fixes the order before the first step of both.
    """
    items: list[int] = []
    flops, turns, mesh = 0.0, parts.step.turns, parts.step.parallel.mesh
    try:
        for step, times in (turns.first_steps if turns is not None else {1: 1}).items():
            rehearse = partial(_rehearse, parts, batch, step, times, items)
            if parts.journal.peak and run.parallel.compile is None:
                flops += times * float(count_flops(rehearse))
            elif mesh.world > 1:
                rehearse()
        parts.evaluate.rehearse()
    except torch.OutOfMemoryError as error:
        raise short_of_memory(parts) from error
    return flops / max(1, sum(items))


def _rehearse(parts: Parts, batch: Mapping[str, Tensor], step: int, times: int, items: list[int]) -> None:
    parallel = parts.step.parallel
    if parallel.mesh.world == 1 or parallel.compiles:  # a dispatch mode would have the model compiled twice
        items.append(times * parts.step.rehearse(batch, step))
        return
    place = found_by(lambda: items.append(times * parts.step.rehearse(batch, step)), parallel.mesh)
    parts.state.world_dependent = parts.state.world_dependent or place


def _check_world(run: RunConfig, parts: Parts, restored: Restored | None) -> None:
    """Raise ConfigError if the loss depends on the number of processes, which was another one."""
    state, mesh = parts.state, parts.step.parallel.mesh
    slots = len(microbatches(run.global_batch, parts.loader.micro_batch, mesh.rank, mesh.world))
    state.world_dependent = state.world_dependent or synced_statistics(state.model, slots)
    check_world(state.world_dependent, restored.world if restored else None, mesh, run.resume.allow)


def _too_small_a_cache(run: RunConfig, loader: Loader) -> str | None:
    """Return a warning if the node cache is too small to avoid repeated downloads of shards, else None."""
    dataset, shards = loader.fetcher.dataset, sum(len(source.rows) for source in loader.order.sources)
    limit, size = dataset.cache_bytes if isinstance(dataset, Prefetchable) else None, mean_sample_bytes(dataset)
    size, window = size * len(dataset), min(run.order.window or shards, shards)
    if limit is None or window * size / shards <= limit:
        return None
    fitting, enough_gb = int(limit * shards / size), 2 * window * size / shards / 1e9
    return (
        f"half of the cache holds {fitting} shards, order.window={window} needs as many at hand: shards will be "
        f"fetched again and again; give loader.cache_gb={enough_gb:.3g}, or a new run order.window={fitting}"
    )


def _announce(run: RunConfig, parts: Parts, restored: Restored | None, flops_per_item: float) -> None:
    mesh, loader = parts.step.parallel.mesh, parts.loader
    parameters = sum(p.numel() for p in parts.state.model.parameters())
    trained = sum(p.numel() for p in parts.state.model.parameters() if p.requires_grad)
    slots = len(microbatches(run.global_batch, loader.micro_batch, mesh.rank, mesh.world))
    epochs = run.steps * run.global_batch / loader.order.samples
    facts = {
        "parameters": short(parameters) + (f", {short(trained)} of them trained" if trained < parameters else ""),
        "world": f"{mesh.world} × {mesh.device.type}, {run.parallel.kind.value}, {run.precision.dtype.value}",
        "batch": f"{run.global_batch} samples = {slots} × {loader.micro_batch} on each process",
        "data": f"{short(loader.order.samples)} samples, {epochs:.3g} epochs in {run.steps} steps",
        **group_facts(parts.state.optimizer, parts.state.model),
        **muon_fact(parts.state.optimizer, parts.state.model),
        **turns_fact(parts.state.optimizer),
        "folder": parts.checkpoints.folder.url,
        "starts from": "new weights" if restored is None else f"step {restored.step} ({restored.why})",
    }
    if restored is None and run.init_from is not None:
        facts["starts from"] = f"the weights of {run.init_from}"
    if (small := _too_small_a_cache(run, loader)) is not None:
        parts.journal.event("small_cache", small)
    for passed in restored.walked_past if restored else ():
        parts.journal.event("walked_past", f"damaged checkpoint set aside: {passed}")
    if model_units := parts.step.parallel.units:
        facts["units"] = model_units
    parts.journal.event("started", step=parts.state.progress.step, world=mesh.world, facts=facts)
    parts.journal.start(
        f"{run.run}, attempt {parts.checkpoints.attempt}", facts, parts.state.progress.step, flops_per_item
    )
