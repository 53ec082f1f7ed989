"""One attempt of a run on one rank: join, train, and report the outcome."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from everstep import compose, frozen_config
from everstep.config import DebugConfig, RunConfig
from everstep.errors import ConfigError, EverstepError
from everstep.outcome import Ending, Outcome
from everstep.process_setup import refuse_debugger, spare_what_lives, use_own_cache, without_collections
from everstep.provenance import record
from everstep.rank_env import RankInfo
from everstep.run_folder import CONFIG, RunFolder
from everstep.trainer.reporting.node_recorder import NodeRecorder
from everstep.trainer.reporting.outcome import OutcomeReport, ending_of, exit_code, lose, refuse
from everstep.trainer.reporting.rank_log import RankLog
from everstep.trainer.reporting.startup_timing import StartupTimer
from everstep.trainer.start import Start, checked_config
from everstep.trainer.stop import Stop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from everstep.trainer.distributed.mesh import Mesh
    from everstep.trainer.loop import Parts
    from everstep.trainer.reporting.stall_report import StallReport
    from everstep.trainer.watchdog.watchdog import Watchdog

LONG_S = 1e6
"""Seconds that ranks wait for one that is in a debugger."""
LAST_SAVE_S = 60.0
"""Seconds that a failed rank waits for the pending save, so that its steps need not be repeated."""


@dataclass(frozen=True)
class Assignment:
    """Result of rank 0's claim, sent to all ranks: the run, its folder, and the number of this attempt."""

    url: str
    attempt: int
    config: str
    micro_batch: int | None = None
    done_at: int | None = None
    """Step of a run that is already done, else None."""


def attempt(arguments: Sequence[str], stop: Stop) -> int:
    """Train as the command line says; return the exit code of the outcome.

    Under torchrun a run that was stopped and saved exits with 0, since torchrun would restart after any other code.
    """
    place, laps = RankInfo.from_environment(), StartupTimer(stop.started)
    refuse_debugger(place.world)
    try:
        place.check_world()
        options = parse(arguments)
        use_own_cache()
        store = _store(place, laps)
        assignment = _assignment(options, place, store, stop.began)
        run = checked_config(assignment.config, options, sent=place.rank > 0)
    except EverstepError as error:
        return refuse(error, place)
    except RuntimeError as error:  # torch's own error when rank 0 and its store are gone
        return lose(error, place)
    laps.end("config")
    if assignment.done_at is not None:
        if place.rank == 0:
            print(f"run {run.run} is done: step {assignment.done_at} of {run.steps} in {assignment.url}")
        return 0
    folder = RunFolder(assignment.url)
    number = assignment.attempt
    with RankLog(folder, number, place.rank) as log, NodeRecorder(run, folder, number, place) as recorder:
        start = Start(folder, number, laps, assignment.micro_batch, recorder)
        ending, failure = _run(run, start, place, store, stop, log)
        report = OutcomeReport(folder, number, place, log.shown)
        if failure is not None:
            report.fail(failure, ending)
        elif place.rank == 0 or ending.outcome not in (Outcome.done, Outcome.preempted):
            report.end(ending)
    if place.rank == 0 and ending.outcome is Outcome.preempted:
        report.remove_marker()
    stopped = ending.outcome is Outcome.preempted and place.under_torchrun
    return _leave(place, 0 if stopped else exit_code(ending))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m everstep.trainer", description="Train one run, alone or under torchrun."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what differs from conf/run.yaml")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")
    parser.add_argument("--frozen", metavar="RUN_URL", help="train what config.yaml in this run folder says")
    parser.add_argument("--plugins", default="", metavar="A,B", help="with --frozen: packages that it may use")
    parser.add_argument("--config-digest", metavar="D", help="with --frozen: digest of the config that was submitted")
    options = parser.parse_intermixed_args(arguments)
    if options.frozen and options.overrides:
        raise ConfigError(f"--frozen takes no overrides ({options.overrides[0]}); the run folder's config is settled")
    return options


def _store(place: RankInfo, laps: StartupTimer) -> Store | None:
    if place.world == 1:
        return None
    from everstep.trainer.distributed.mesh import join

    laps.end("import")
    joined = join(place, timeout_s=float(os.environ.get("EVERSTEP_JOIN_TIMEOUT_S", "300")))
    laps.end("rendezvous")
    return joined


def _assignment(options: argparse.Namespace, place: RankInfo, store: Store | None, began: float) -> Assignment:
    """Compose (or read), freeze and claim the run on rank 0; the other ranks receive it over the store."""

    def decide() -> str:
        return json.dumps(vars(_claim(options, place, began)))

    if store is None:
        return Assignment(**json.loads(decide()))
    from everstep.trainer.distributed.mesh import tell

    return Assignment(**json.loads(tell(store, place, decide)))


def _claim(options: argparse.Namespace, place: RankInfo, began: float) -> Assignment:
    run, folder = _frozen(options) if options.frozen else _composed(options, place)
    last = folder.last_ending()
    text = frozen_config.freeze(run)
    if last is not None and last.is_done(run.steps, run.evaluate.patience):
        return Assignment(folder.url, 0, text, done_at=last.step)
    number = folder.claim({"world": place.world, "config_digest": frozen_config.digest(run), "began": began})
    return Assignment(folder.url, number, text, last.micro_batch if last is not None else None)


def _frozen(options: argparse.Namespace) -> tuple[RunConfig, RunFolder]:
    folder = RunFolder(options.frozen)
    try:
        return checked_config(folder.storage.read(CONFIG), options), folder
    except FileNotFoundError as error:
        raise ConfigError(f"{options.frozen} is not a run folder: it has no {CONFIG}") from error


def _composed(options: argparse.Namespace, place: RankInfo) -> tuple[RunConfig, RunFolder]:
    composed = compose.compose(options.overrides, options.config_dir)
    if composed.run.run is None and place.nodes > 1:
        raise ConfigError(f"run=null on {place.nodes} nodes: a restart has to find its folder again; give run=NAME")
    run = compose.with_name(composed, place.started())
    folder = RunFolder.of(run.run_root, str(run.run))
    for change in frozen_config.settle(run, folder):
        print(f"changed since the last start: {change}")
    run = frozen_config.with_steps_of(frozen_config.thaw(folder.storage.read(CONFIG)), run)
    record(folder, run, sys.argv)
    return run, folder


def _run(
    run: RunConfig,
    start: Start,
    place: RankInfo,
    store: Store | None,
    stop: Stop,
    log: RankLog,
) -> tuple[Ending, BaseException | None]:
    """Build and train; return the ending, and the error that caused it."""
    with without_collections():
        from everstep.trainer.assemble import assemble
        from everstep.trainer.build import build
        from everstep.trainer.debug.session import train_debugged
        from everstep.trainer.debug.terminal import give_terminal, post_mortem
        from everstep.trainer.distributed.mesh import form, lost_peer, part
        from everstep.trainer.loop import train
        from everstep.trainer.reporting.stall_report import StallReport
        from everstep.trainer.watchdog.activity import Phase
        from everstep.trainer.watchdog.evidence import record_flights

    start.laps.end("import")
    debugged = run.debug.rank is not None
    mesh, parts, watchdog = None, None, None
    try:
        give_terminal(run.debug, place.rank, place.world)
        stop.watch(run.stop, start.folder if place.rank == 0 else None)
        if run.stop.stall_s is not None:
            record_flights()
        mesh = form(place, store, run.parallel, LONG_S if debugged else run.group_timeout_s)
        start.laps.end("rendezvous")
        report = StallReport(start.folder, start.attempt, place.rank)
        watchdog = _watchdog(mesh, None if debugged else run.stop.stall_s, report, log.file)
        built = build(run, start, mesh)
        run = built.run
        mesh.activity.at(Phase.restore, 0)
        restored = built.checkpoints.restore()
        start.laps.end("load")
        mesh.activity.at(Phase.rehearse, 0)
        parts = assemble(run, start, built, restored, stop)
        spare_what_lives()
        ending = train_debugged(run, parts, train) if run.debug != DebugConfig() else train(run, parts)
        mesh.activity.at(Phase.end, ending.step)
        _close(parts, ending)
        part()
    except BaseException as error:
        post_mortem(run.debug, error, mesh, place.rank, place.world)
        if parts is not None and not lost_peer(error):
            parts.checkpoints.drain(LAST_SAVE_S)
        step = parts.state.progress.step if parts is not None else 0
        return ending_of(error, step, place, run.plugins), error
    finally:
        stop.close()
        if parts is not None:
            parts.profiler.close(parts.state.progress.step)
            parts.loader.close()
            parts.journal.close()
        if watchdog is not None:
            watchdog.close()
    return ending, None


def _watchdog(mesh: Mesh, stall_s: float | None, report: StallReport, log: Path) -> Watchdog | None:
    from everstep.trainer.watchdog.exchange import Exchange
    from everstep.trainer.watchdog.watchdog import Watchdog

    if stall_s is None:
        return None
    return Watchdog(mesh.activity, Exchange(mesh.store, mesh.rank, mesh.world), stall_s, report, log)


def _close(parts: Parts, ending: Ending) -> None:
    if parts.checkpoints.saved_step == ending.step:
        parts.checkpoints.close()
    if ending.outcome is Outcome.done:
        _preview(parts)
    parts.journal.event("ended", f"{ending.outcome.value} at step {ending.step}", outcome=ending.outcome.value)


def _preview(parts: Parts) -> None:
    """Show the task's preview of the trained model; a fault is only reported, since the run is saved."""
    preview = getattr(parts.step.task, "preview", None)
    if preview is None:
        return
    try:
        text = str(preview(parts.step.parallel.module) or "")
    except Exception as error:
        logging.getLogger("everstep").warning("the task's preview failed", exc_info=True)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        parts.journal.event(
            "preview_failed", f"warning: the task's preview failed, the run is done all the same: {said}"
        )
        return
    if text.strip():
        parts.journal.event("preview", f"a sample of what it has learnt:\n{text}")


def _leave(place: RankInfo, code: int) -> int:
    """Exit without a collective, since one with a failed rank would never end (see also `mesh.part`)."""
    if place.world > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
