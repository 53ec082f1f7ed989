"""Training loop: step, evaluate, save and stop, in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from everstep.config import EvaluateConfig, Nonfinite, NonfiniteConfig, RunConfig
from everstep.errors import DivergedError, ShortOfMemoryError
from everstep.outcome import Ending, Outcome
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.data.fetcher import Microbatch
from everstep.trainer.data.loader import Loader
from everstep.trainer.debug.memory_report import report
from everstep.trainer.debug.profiler import StepProfiler
from everstep.trainer.evaluate import Evaluator, keep_score
from everstep.trainer.hooks import Hooks
from everstep.trainer.reporting.reporter import Reporter
from everstep.trainer.state.train_state import TrainState
from everstep.trainer.step import Stepper
from everstep.trainer.step_info import StepInfo
from everstep.trainer.watchdog.activity import Phase


@dataclass(frozen=True)
class Parts:
    """Parts that `build` makes of a config, with the state restored."""

    state: TrainState
    loader: Loader
    step: Stepper
    evaluate: Evaluator
    checkpoints: Checkpointer
    journal: Reporter
    hooks: Hooks
    profiler: StepProfiler


def train(run: RunConfig, parts: Parts) -> Ending:
    """Train up to `run.steps`, or until a stop is agreed.

    At the top of each round the state is that after exactly `progress.step` updates. Actions due at that step
    (evaluation, checkpoint, the end) happen there, and also when a restart resumes at that step.
    """
    state, checkpoints = parts.state, parts.checkpoints
    if parts.journal.media is not None:
        parts.journal.media.open()
    batches = parts.loader.steps(state.progress.step)
    stopping = save_failed = False
    while True:
        at = state.progress.step
        finished = at >= run.steps or _out_of_patience(run.evaluate, state)
        improved = False
        if not stopping and parts.evaluate.due(at, last=finished):
            stopping, improved = _evaluate(run.evaluate, parts)
            finished = finished or _out_of_patience(run.evaluate, state)
        last = finished or stopping
        # A rollback needs a checkpoint, so one is saved before the first step.
        first = at == 0 and run.nonfinite.policy is Nonfinite.rollback and checkpoints.saved_step != 0
        best = improved and run.checkpoint.keep_best > 0
        due = checkpoints.due(at) or first or save_failed or best or (last and at > 0)
        if due or checkpoints.due_on_nodes(at):
            _save(parts, last, local=not due or (stopping and _short_of_time(parts)))
        if stopping:
            return Ending(Outcome.preempted, at, parts.step.stop.reason or "another rank was asked to stop")
        if finished:
            if at >= run.steps:
                return Ending(Outcome.done, at)
            reason = f"{run.evaluate.metric} is no better than at step {state.progress.best_step}"
            return Ending(Outcome.done, at, reason, patience=run.evaluate.patience)
        try:
            infos = _step(run.steps, parts, batches)
        except torch.OutOfMemoryError as error:
            _halve(parts, error)
            batches = parts.loader.steps(at)
            continue
        if checkpoints.preallocate():
            state.check_agreement(parts.step.parallel.mesh)
        stopping, save_failed = any(info.stop for info in infos), any(info.save_failed for info in infos)
        if _note(run.nonfinite, parts, infos) and run.nonfinite.policy is Nonfinite.rollback:
            _roll_back(parts)
            batches = parts.loader.steps(state.progress.step)


def _note(nonfinite: NonfiniteConfig, parts: Parts, infos: Sequence[StepInfo]) -> bool:
    """Account for finished steps; True if one of them was not finite."""
    progress, bad = parts.state.progress, False
    parts.journal.record_saves(parts.checkpoints.finished_saves)
    parts.journal.record_stragglers(parts.step.activity.stragglers)
    for info in infos:
        progress.items += info.items
        parts.journal.step(info, parts.loader.wait_s)
        parts.hooks(info, parts.step.activity, progress.step, parts.journal.media)
        _note_harmless(parts, info)
        if info.finite and not info.overflow and not info.empty:
            progress.nonfinite = 0
        if not info.finite:
            bad = True
            progress.nonfinite += 1
            parts.journal.event(
                "nonfinite",
                f"step {info.step} gave NaN or Inf (loss {info.loss}, gradient norm {info.norm}"
                f"{_where(parts)}); it changed nothing",
                step=info.step,
            )
            if progress.nonfinite >= nonfinite.limit:
                raise DivergedError(
                    f"{progress.nonfinite} steps in a row gave NaN or Inf, the last was step {info.step} "
                    f"(learning rate {info.lr:.3g}); nonfinite.limit={nonfinite.limit}"
                )
    return bad


def _where(parts: Parts) -> str:
    found = parts.step.update.nonfinite
    return f", not finite in the gradient of {found}" if found else "; debug=anomaly names the layer"


def _note_harmless(parts: Parts, info: StepInfo) -> None:
    """Count the steps that changed nothing but are harmless; report the first of each kind."""
    progress = parts.state.progress
    if info.overflow:
        measured = f"(loss {info.loss:.4g}, gradient norm {info.norm})"
        progress.overflows += 1
        line = f"step {info.step} overflowed in fp16 {measured}; the loss scale is halved, which is how it is found"
        parts.journal.event("overflow", line if progress.overflows == 1 else "", step=info.step)
    if info.empty:
        progress.empty += 1
        line = f"no item of the batch of step {info.step} counts in the loss; such steps change nothing"
        parts.journal.event("empty_batch", line if progress.empty == 1 else "", step=info.step)


def _step(steps: int, parts: Parts, batches: Iterator[list[Microbatch]]) -> list[StepInfo]:
    """Run one step; return the results that are due.

    All results are returned if the weights are needed next, for an evaluation, a checkpoint or the end.
    """
    parts.step.activity.at(Phase.data, parts.state.progress.step + 1)
    if parts.profiler.active:
        parts.profiler.before_step(parts.state.progress.step + 1)
    parts.step(next(batches))
    at = parts.state.progress.step
    saving = parts.checkpoints.due(at) or parts.checkpoints.due_on_nodes(at)
    pausing = at >= steps or saving or parts.evaluate.due(at, last=False) or parts.hooks.due(at)
    infos = parts.step.results(all_of_them=pausing)
    if any(info.stop for info in infos):
        infos += parts.step.results(all_of_them=True)
    return infos


def _evaluate(config: EvaluateConfig, parts: Parts) -> tuple[bool, bool]:
    """Evaluate; return (True if a stop was agreed meanwhile, True if the metric is the best so far)."""
    start = time.perf_counter()
    parts.step.activity.at(Phase.evaluate, parts.state.progress.step)
    try:
        metrics = parts.evaluate()
    except torch.OutOfMemoryError as error:
        raise short_of_memory(parts) from error
    seconds = time.perf_counter() - start
    parts.journal.pause(seconds)
    if metrics is None:
        return True, False
    best = keep_score(parts.state.progress, config, metrics)
    parts.journal.evaluated(parts.state.progress.step, metrics, best, seconds)
    return False, best


def _save(parts: Parts, last: bool, local: bool) -> None:
    """Start a save of this step if there is none yet; before the run ends, wait for it and retry it.

    checkpointer.py describes what happens to a save that fails.
    """
    checkpoints, step, done = parts.checkpoints, parts.state.progress.step, False
    start = time.perf_counter()
    parts.step.activity.at(Phase.save, step)
    while not done:
        if checkpoints.saved_step != step and not checkpoints.save(local, last):
            parts.journal.event("save_skipped", step=step)
        done = not last or checkpoints.finish()
        parts.journal.record_saves(checkpoints.finished_saves)
        if not done and not local:
            time.sleep(checkpoints.retry_s)
            parts.step.activity.tick()
        local = False
    parts.journal.pause(time.perf_counter() - start)


def _short_of_time(parts: Parts) -> bool:
    """True if the grace period is too short for a save to the run folder, so that the node tier is used."""
    checkpoints = parts.checkpoints
    left_s, needed_s = checkpoints.time_to_save(parts.step.stop.left_s())
    if left_s is None or not needed_s:
        return False
    short = checkpoints.has_node_tier and needed_s > left_s
    parts.journal.event(
        "last_save",
        f"{left_s:.0f} s are left to save, it takes about {needed_s:.1f} s"
        + (": saving on the nodes' own disks" if short else ""),
        left_s=left_s,
        needed_s=needed_s,
        local=short,
    )
    return short


def _out_of_patience(config: EvaluateConfig, state: TrainState) -> bool:
    return config.patience is not None and state.progress.stale >= config.patience


def _roll_back(parts: Parts) -> None:
    """Restore the last checkpoint and continue with the next batch; the steps in between are left out."""
    reached = parts.state.progress.step
    nonfinite, over = parts.state.progress.nonfinite, parts.state.progress.passed_over
    parts.step.activity.at(Phase.rollback, reached)
    step = parts.checkpoints.reload()
    parts.step.forget()
    progress = parts.state.progress
    progress.step, progress.nonfinite, progress.passed_over = reached, nonfinite, [*over, [step + 1, reached]]
    parts.journal.event(
        "rolled_back",
        f"back to the weights of step {step}; the batches of steps {step + 1} to {reached} are passed over",
        step=reached,
        checkpoint=step,
    )


def _halve(parts: Parts, error: torch.OutOfMemoryError) -> None:
    """Continue with half the microbatch; with several ranks, raise an error so that all restart with it."""
    short = short_of_memory(parts)
    if parts.step.parallel.mesh.world > 1 or short.micro_batch is None:
        raise short from error
    parts.state.optimizer.zero_grad(set_to_none=True)
    parts.state.progress.micro_batch = parts.loader.micro_batch = short.micro_batch
    parts.journal.event("out_of_memory", f"{short}; going on with half of it", micro_batch=short.micro_batch)


def short_of_memory(parts: Parts) -> ShortOfMemoryError:
    """Return the error that ends an attempt whose microbatch does not fit; the next attempt halves it."""
    size = parts.loader.micro_batch
    message = f"rank {parts.step.parallel.mesh.rank} ran out of memory with micro_batch={size}; {report(parts)}"
    return ShortOfMemoryError(message, size // 2 or None)
