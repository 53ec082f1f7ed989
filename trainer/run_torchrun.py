"""torchrun as `everstep` starts it: the same agent, with our rendezvous and without its error report.

When a worker fails, torchrun prints a page about it and a traceback of its own. Our workers have already printed one
line on what to fix, and that line should be the last. For a worker that was killed, the agent prints the rank and the
signal, and records them as the outcome.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from everstep.errors import EverstepError
from everstep.fault import WATCHDOG_SIGNAL, OutOfMemoryCount, death_of
from everstep.outcome import Ending, Outcome
from everstep.process_setup import keep_printing
from everstep.rank_env import AGENT_PID, LOST_PEER, STALLED
from everstep.run_folder import PROGRESS, STARTER, RunFolder
from everstep.trainer.distributed import agent_rendezvous
from everstep.trainer.reporting.outcome import hand_over

TERMINATED = -15
"""Exit code of a worker that torchrun has terminated because another one failed."""


def main() -> int:
    for name in ("multiprocessing.api", "multiprocessing.errors", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    keep_printing()
    os.environ[AGENT_PID] = str(os.getpid())
    agent_rendezvous.register()
    memory = OutOfMemoryCount()
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as failed:
        rank, first = first_failure(failed.failures)
        if any(failure.exitcode == STALLED for failure in failed.failures.values()):
            return 1
        if first.exitcode < 0:
            died = death_of(f"rank {rank}{_where(sys.argv)}", -first.exitcode, memory.since())
            outcome = Outcome.stalled if first.exitcode == -WATCHDOG_SIGNAL else Outcome.crashed
            tell(sys.argv[1:], Ending(outcome, 0, died, rank=rank))
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    except EverstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first; of several at once, one that did not merely lose another."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, bool]:
        _, failure = item
        return failure.timestamp, failure.exitcode in (LOST_PEER, TERMINATED)

    return min(failures.items(), key=order)


def tell(arguments: Sequence[str], ending: Ending) -> None:
    """Print the cause of a worker's death and record it as the outcome of the attempt.

    If there is no attempt, pass it to the launcher.

    Args:
        arguments: the agent's own; they name the run folder if the program is our trainer.
    """
    print(f"error: {ending.reason}", file=sys.stderr)
    if "--frozen" not in arguments:
        return
    folder = RunFolder(arguments[arguments.index("--frozen") + 1])
    try:
        starter = os.environ.get(STARTER)
        ours = [number for number in folder.attempts()[-2:] if starter and folder.starter(number) == starter]
        if ours:
            said = folder.ending(ours[-1])
            step = said.step if said is not None else folder.facts(PROGRESS).get("step", 0)
            folder.end(ours[-1], dataclasses.replace(ending, step=step))
            return
    except (EverstepError, OSError) as error:
        print(f"the reason is kept by the launcher: {error}", file=sys.stderr)
    hand_over(ending)


def _where(arguments: Sequence[str]) -> str:
    return "" if "--nnodes=1" in arguments else f" on {socket.gethostname()}"


if __name__ == "__main__":
    sys.exit(main())
