"""Parser of `replay` in the trainer: the launcher prepares with it, trains, and compares with it."""

from __future__ import annotations

import argparse
from typing import Any

from everstep.checked_json import mapping
from everstep.errors import printable
from everstep.run_folder import RunFolder
from everstep.security.secret_detection import without_secrets
from everstep.storage import join_url, open_storage


def add_parser(verbs: Any) -> None:
    """Add the verb; it sets `run_verb`."""
    replay = verbs.add_parser("replay")
    replay.add_argument("work", metavar="WORK_URL", help="scratch folder: plan.json, and the run folder `run`")
    replay.add_argument("--source", required=True, metavar="RUN_URL")
    replay.add_argument("--first", type=int)
    replay.add_argument("--last", type=int)
    replay.add_argument("--ended", type=int, metavar="CODE", help="exit code of the training, to compare now")
    replay.set_defaults(run_verb=_run)


def _run(options: argparse.Namespace) -> int:
    """Prepare, or conclude once a fault is found or the training has ended; 1 if B is not proved."""
    from everstep.trainer.replay.plan import PLAN, Plan, prepare

    run, scratch = RunFolder(options.source), RunFolder(join_url(options.work, "run"))
    work = open_storage(options.work)
    if options.ended is None:
        plan = prepare(run, scratch, options.first, options.last)
        work.write(PLAN, plan.to_json())
        if not plan.problems:
            return 0
    else:
        plan = Plan(**mapping(RunFolder(options.work).record(PLAN), PLAN))
    return _conclude(run, scratch, plan, options.ended)


def _conclude(run: RunFolder, scratch: RunFolder, plan: Any, ended: int | None) -> int:
    from everstep.trainer.replay.comparison import result_of, write_result

    facts = result_of(run, scratch, plan, ended)
    path = write_result(run, facts)
    for problem in facts["problems"]:
        print(printable(without_secrets(problem)))
    if facts["proved"]:
        print(f"proved: {plan.last} comes from {plan.first}, {len(facts['tensors'])} tensors equal to the last bit")
    else:
        print(f"not proved: {plan.last} from {plan.first}")
    print(printable(f"written to {run.url}/{path}"))
    return 0 if facts["proved"] else 1
