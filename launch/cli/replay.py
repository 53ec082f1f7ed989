"""`everstep replay RUN --from A --to B`: train between two checkpoints again, and compare."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from everstep.errors import ConfigError
from everstep.frozen_config import start_digest, thaw
from everstep.launch import torchrun
from everstep.launch.cli.resume import code_place
from everstep.launch.config import JobConfig, job_config
from everstep.launch.parser import Arguments, add_overrides
from everstep.launch.runs.lookup import add_root
from everstep.launch.submit.override_frozen import amend
from everstep.launch.submit.snapshot import open_code, search_path
from everstep.launch.trained import ChosenRun, choose_run, run_trainer, write_config
from everstep.run_folder import CONFIG, RunFolder
from everstep.storage import open_storage

PLAN = "plan.json"
CHANGEABLE = ("job.", "parallel")
EXAMPLES = """examples:
  everstep replay demo --from 100 --to 200
  everstep replay demo --from 100 --to 200 job.nproc=4     on another number of processes, which is no proof

exit codes: 0 step B came from A by this code and data, to the last bit; 1 that is not proved; 2 wrong usage
"""


def replay(arguments: Sequence[str]) -> int:
    """Run the verb; everything is done in a scratch folder, and only the result goes into the run folder."""
    options = _parser().parse_intermixed_args(arguments)
    for word in options.overrides:
        if not word.lstrip("+").startswith(CHANGEABLE):
            raise ConfigError(f"{word}: a replay has the config of its run; only job.… and parallel may differ")
    chosen = choose_run(options.run, options, [])
    scratch = Path(tempfile.mkdtemp(prefix="everstep-replay-", dir=options.scratch))
    try:
        return _replay(chosen, scratch, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replay(chosen: ChosenRun, scratch: Path, options: argparse.Namespace) -> int:
    verb = ["replay", str(scratch), "--source", chosen.folder.url]
    job = _with_code(chosen)
    alone = dataclasses.replace(job, nproc=1)
    code = run_trainer([*verb, "--first", str(options.first), "--last", str(options.last)], alone)
    run = RunFolder(str(scratch / "run"))
    if code or not run.storage.exists(CONFIG):
        return code
    plan = RunFolder(str(scratch)).facts(PLAN)
    config, said = amend(thaw(run.storage.read(CONFIG)), {}, [f"job.nproc={plan['world']}", *options.overrides])
    world = dataclasses.replace(job, nproc=job_config(said).nproc)
    config.parallel.check_world(int(world.nproc))
    if config.plugins != chosen.config.plugins:
        raise ConfigError(f"plugins={config.plugins}: {chosen.folder.url} names {chosen.config.plugins} now")
    write_config(open_storage(run.url), config)
    program = torchrun.trainer(run.storage.url, config.plugins, start_digest(config))
    ended = run_trainer(program[2:], world)
    return run_trainer([*verb, "--ended", str(ended)], alone)


def _with_code(chosen: ChosenRun) -> JobConfig:
    """Return the job of the replay: the environment of the run, and its snapshot of the code if any."""
    place = code_place(chosen.folder)
    if place is None:
        return chosen.job
    given = chosen.job.env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    path = search_path(open_code(chosen.folder, place, chosen.job.code_mb), given)
    return dataclasses.replace(chosen.job, env={**chosen.job.env, **path})


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep replay",
        description="Train the steps between two checkpoints of a run again, and compare every tensor.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a name, a path or a URL")
    add_root(parser)
    add_overrides(parser, "processes: job.nproc=…")
    parser.add_argument("--from", dest="first", type=int, required=True, metavar="A", help="step of a checkpoint")
    parser.add_argument("--to", dest="last", type=int, required=True, metavar="B", help="step of a later one")
    parser.add_argument("--scratch", metavar="FOLDER", help="where to put the copy; as large as two checkpoints")
    parser.add_argument("--trust", action="store_true", help="run what the folder of another user names")
    parser.set_defaults(verb="replay")
    return parser
