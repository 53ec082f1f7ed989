"""Decisions before and after each start of the trainer, for the batch script.

python -m everstep.launch.restart.decide element LIST N     prints the run folder of element N of an array, and its spec
python -m everstep.launch.restart.decide begin RUN_FOLDER   prints the number of the start; not 0: do not start
python -m everstep.launch.restart.decide end RUN_FOLDER NUMBER --code=C [--noticed]
                                                            prints `again`, `requeue [NODES]`, `wait`, `hold`
                                                            or `exit CODE`
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from everstep.errors import EverstepError, StorageError
from everstep.launch.config.notify import NotifyConfig
from everstep.launch.console import say
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.start_record import Start, decisions
from everstep.launch.restart.job_policy import Action, Evidence, RestartDecision, judge
from everstep.launch.runs.notifier import tell_decision
from everstep.launch.submit.array import run_of
from everstep.launch.submit.job_spec import JobSpec
from everstep.outcome import Ending, Outcome
from everstep.run_folder import STOP_MARKER, RunFolder

T = TypeVar("T")
WAIT = "EVERSTEP_FOLDER_WAIT_S"
"""Environment variable that overrides WAIT_S."""
WAIT_S, AGAIN_S = 120.0, 2.0
"""Seconds to keep the nodes while the run folder is unusable, and between two tries."""
HOLD = 85
"""Exit code of `begin` if the job must be held until the run folder can be written."""
ALREADY_OVER = 86
"""Exit code of `begin` if the run needs no other start; the batch script then exits with 0."""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.what == "element":
            print("\n".join(filter(None, run_of(options.list, options.number, options.spec))))
            return 0
        folder = RunFolder(options.folder)
        if options.what == "begin":
            return patiently(lambda: begin(folder, Allocation.of(os.environ), options.spec))
        return patiently(lambda: end(Start(folder, options.number), options.code, options.noticed, options.spec))
    except Unusable as unusable:
        say(f"{unusable}; the job waits in the queue, held: when that is mended, scontrol release lets it go on")
        print("hold")
        return HOLD
    except EverstepError as error:
        say(str(error))
        print(f"exit {error.exit_code}")
        return error.exit_code


class Unusable(Exception):
    """The run folder has been unusable for too long; the message is the last error."""


def patiently(work: Callable[[], T]) -> T:
    """Retry `work` while the run folder cannot be read or written; raise Unusable after WAIT_S."""
    deadline, told = time.monotonic() + float(os.environ.get(WAIT, WAIT_S)), False
    while True:
        try:
            return work()
        except (OSError, StorageError) as error:
            if isinstance(error, StorageError) and not error.passing:
                raise
            if not told:
                say(f"waiting for the run folder: {error}")
                told = True
            if time.monotonic() > deadline:
                raise Unusable(str(error)) from error
            time.sleep(AGAIN_S)


def begin(folder: RunFolder, allocation: Allocation, spec: str | None = None) -> int:
    """Claim the next start; first decide about a start that ended together with its batch script."""
    submitted = JobSpec.submitted(folder, spec)
    before = Start.newest(folder)
    if before is not None and before.facts["job"] == allocation.job and decision(before) is None:
        verdict = keep(before, decide(before, submitted, Evidence(lost=True)), submitted.job.notify)
        if verdict.action is Action.exit:
            return verdict.exit_code or ALREADY_OVER
    folder.storage.delete(STOP_MARKER)  # the marker of an earlier stop would end this start too
    start = Start.claim(folder, allocation, folder.reached_step())
    say(f"start {start.number} of job {allocation.job} on {', '.join(allocation.hosts)}")
    print(start.number)
    return 0


def end(start: Start, code: int, noticed: bool, spec: str | None = None) -> int:
    """Decide, record the decision, and print it for the batch script."""
    submitted = JobSpec.submitted(start.folder, spec)
    verdict = decide(start, submitted, Evidence(code=code, noticed=noticed))
    if verdict.action is Action.wait:
        say(verdict.reason)  # not a decision about the run, so it is not recorded there
    else:
        try:
            patiently(lambda: keep(start, verdict, submitted.job.notify))
        except Unusable as unusable:
            say(verdict.reason)
            if verdict.action is not Action.exit:
                raise
            say(f"not written down ({unusable}); that costs the run nothing")
    if verdict.action is Action.exit:
        print(f"exit {verdict.exit_code}")
    else:
        print(verdict.action.value, ",".join(verdict.exclude))
    return 0


def decide(start: Start, submitted: JobSpec, known: Evidence) -> RestartDecision:
    """Return the decision after a start, from `known` and from the run folder."""
    folder, job = start.folder, submitted.job
    attempts = folder.attempts()
    ours = [number for number in attempts if folder.starter(number) == start.starter]
    reports = tuple(start.reports())
    told = next((report.said for report in reports if report.said is not None), None)
    ending = (folder.ending(ours[-1]) if ours else None) or told
    failed = ending is not None and ending.outcome is Outcome.crashed
    earlier = [d for d in decisions(folder) if d.get("job") == start.facts["job"]]
    excluded = {*job.exclude, *(host for kept in earlier for host in kept.get("exclude", []))}
    evidence = dataclasses.replace(
        known,
        ending=ending,
        hosts=tuple(start.facts["hosts"]),
        reports=reports,
        progressed=folder.reached_step() > (start.facts["step"] or 0),
        is_trainer=submitted.is_trainer,
        left_behind=start.is_left_behind(),
        overtaken=Start.numbers(folder)[-1] > start.number or (bool(ours) and attempts[-1] > ours[-1]),
        shrank=_shrank(folder, ending, ours),
        spent=earlier[-1].get("restarts", 0) if earlier else 0,
        stepped=not failed or folder.has_stepped(),
        repeated=failed and ending is not None and folder.is_repeated(ours[-1] if ours else 0, ending),
        stalls=_stalls(folder, ending),
    )
    verdict = judge(evidence, job.all_causes(), job.max_restarts)
    # The scheduler replaces its exclude list as a whole, so it must hold the nodes of earlier decisions too.
    return dataclasses.replace(verdict, exclude=tuple(sorted({*excluded, *verdict.exclude})) if verdict.exclude else ())


def _stalls(folder: RunFolder, ending: Ending | None) -> dict[str, int]:
    """Return host → attempts that have stalled because of it, if the last one has stalled."""
    if ending is None or ending.outcome is not Outcome.stalled:
        return {}
    before = [each for number in folder.attempts() if (each := folder.ending(number)) is not None]
    return dict(Counter(each.node for each in before if each.outcome is Outcome.stalled and each.node))


def _shrank(folder: RunFolder, ending: Ending | None, ours: list[int]) -> bool:
    """After out_of_memory: True if the next microbatch would be smaller than all before."""
    if ending is None or ending.micro_batch is None:
        return True
    before = [old for number in folder.attempts() if number < ours[-1] and (old := folder.ending(number)) is not None]
    return all(old.micro_batch is None or ending.micro_batch < old.micro_batch for old in before)


def decision(start: Start) -> dict[str, object] | None:
    """Return the recorded decision after a start; None if there is none."""
    return next((found for found in decisions(start.folder) if found.get("start") == start.number), None)


def keep(start: Start, verdict: RestartDecision, notify: NotifyConfig) -> RestartDecision:
    """Record, print and tell the decision; return it."""
    start.folder.record_restart(
        {
            **dataclasses.asdict(verdict),
            "outcome": verdict.cause,
            "action": verdict.action.value,
            "go_on": verdict.action in (Action.again, Action.requeue),
            "start": start.number,
            "job": start.facts["job"],
        }
    )
    say(verdict.reason)
    tell_decision(start.folder, notify, verdict.cause, verdict.reason)
    return verdict


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m everstep.launch.restart.decide", description=__doc__)
    verbs = parser.add_subparsers(dest="what", required=True)
    one = verbs.add_parser("element")
    one.add_argument("list")
    one.add_argument("number", type=int)
    before = verbs.add_parser("begin")
    before.add_argument("folder")
    after = verbs.add_parser("end")
    after.add_argument("folder")
    after.add_argument("number", type=int)
    after.add_argument("--code", type=int, required=True, help="exit code of the step")
    after.add_argument("--noticed", action="store_true", help="the scheduler has given notice of an end")
    for each in (one, before, after):
        each.add_argument("--spec", help="digest of what was submitted; without it, the user must have written it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
