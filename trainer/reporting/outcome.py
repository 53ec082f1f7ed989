"""Report why an attempt ended: to the user in one line, in the run folder, and to the launcher."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass

from everstep.errors import (
    ConfigError,
    DivergedError,
    EverstepError,
    ShortOfMemoryError,
    SupersededError,
    printable,
)
from everstep.fault import LONGEST_REASON, fault_of, place_of, reason_of
from everstep.outcome import Ending, Fault, Outcome
from everstep.rank_env import AGENT_PID, LOST_PEER, RankInfo
from everstep.run_folder import ENDING_FILE, STOP_MARKER, RunFolder

LOG = logging.getLogger("everstep")
LEFT = (
    "the debugger was left, or found no terminal; it needs a terminal and one process: job.nproc=1, debug.rank=0, or "
    "python -m everstep.trainer"
)
LONGEST_ENDING = 1 << 16
"""Bytes of an ending."""
TRIES, PAUSE_S = 3, 1.0
"""Attempts to write an outcome that the run folder refuses, and seconds between them."""


def ending_of(error: BaseException, step: int, place: RankInfo, plugins: list[str]) -> Ending:
    """Return the ending of an attempt that an error ends."""
    from everstep.trainer.distributed.mesh import lost_peer

    outcome, reason, micro_batch = Outcome.crashed, str(error), None
    if isinstance(error, ShortOfMemoryError):
        outcome, micro_batch = Outcome.out_of_memory, error.micro_batch
    elif isinstance(error, SupersededError):
        outcome = Outcome.superseded
    elif isinstance(error, DivergedError):
        outcome = Outcome.diverged
    elif isinstance(error, EverstepError):
        outcome = Outcome.config_error
    elif lost_peer(error):
        reason = f"rank {place.rank} lost another rank ({_of_peer(error)})"
        return Ending(outcome, step, reason, rank=place.rank, error=type(error).__name__, lost_peer=True)
    elif fault_of(error) is Fault.left:
        stopped = sys.stdin is not None and sys.stdin.isatty()
        outcome, reason = (Outcome.preempted, "pdb was left") if stopped else (Outcome.crashed, LEFT)
    else:
        reason = reason_of(error)
    line = "" if isinstance(error, EverstepError) else place_of(error, plugins)
    return Ending(outcome, step, reason, micro_batch, place.rank, None, fault_of(error), type(error).__name__, line)


def _of_peer(error: BaseException) -> str:
    """Return torch's text about a peer, without gloo's source file and advice."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error)).split(". This is typically")[0].split("Exception raised from")[0]
    return " ".join(text.split())[:LONGEST_REASON] or type(error).__name__


def exit_code(ending: Ending) -> int:
    """Return the exit code of a rank; for our own agent it marks ranks that are not the first to fail."""
    return LOST_PEER if ending.lost_peer and AGENT_PID in os.environ else ending.outcome.exit_code


@dataclass(frozen=True)
class OutcomeReport:
    """Report of how this rank's part in an attempt ended."""

    folder: RunFolder
    attempt: int
    place: RankInfo
    log: str
    """Path of the rank's log, for the user."""

    def fail(self, error: BaseException, ending: Ending) -> None:
        """Log the error, and show it if it is the first of all ranks: the others fail alike, or because of it."""
        LOG.error("%s", "".join(traceback.format_exception(error)))
        if isinstance(error, EverstepError) and error.told:
            return
        if self.end(ending) and not (ending.lost_peer and AGENT_PID in os.environ):
            show(error, ending, self.log)

    def end(self, ending: Ending) -> bool:
        """Write the outcome into the run folder, else to the launcher; True if it is the first of all ranks."""
        for left in reversed(range(TRIES)):
            try:
                return self.folder.end(self.attempt, ending)
            except (EverstepError, OSError) as error:
                LOG.error("cannot write down how this ended: %s", error)
                if left:
                    time.sleep(PAUSE_S)
                elif hand_over(ending):
                    print(f"the outcome is kept by the launcher: {error}", file=sys.stderr)
                else:
                    print(f"cannot write down how this ended ({ending.outcome.value}): {error}", file=sys.stderr)
        return True

    def remove_marker(self) -> None:
        """Remove the stop marker, which would stop the next attempt too."""
        try:
            self.folder.storage.delete(STOP_MARKER)
        except (EverstepError, OSError) as error:
            print(f"cannot remove the stop marker in {self.folder.url}: {error}", file=sys.stderr)


def hand_over(ending: Ending) -> bool:
    """Write an ending into the launcher's memory; return False if there is no launcher.

    An ending of another rank is kept, unless this one replaces it.
    """
    file = os.environ.get(ENDING_FILE)
    if not file:
        return False
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # ranks that fail together would mix their endings
            if _is_replaced_by(os.pread(descriptor, LONGEST_ENDING, 0), ending):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, ending.to_json(), 0)
            return True
        finally:
            os.close(descriptor)
    return False


def _is_replaced_by(written: bytes, ending: Ending) -> bool:
    """True if nothing was written, or only that another rank was lost, while this ending names a cause."""
    try:
        return not written or (Ending.from_json(written).lost_peer and not ending.lost_peer)
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def refuse(error: EverstepError, place: RankInfo) -> int:
    """Show an error that rank 0 met before the attempt had a number; return the exit code."""
    if not error.told:
        ending = Ending(
            Outcome.crashed if error.exit_code == 1 else Outcome.config_error,
            0,
            str(error),
            rank=place.rank,
            fault=fault_of(error),
            error=type(error).__name__,
        )
        hand_over(ending)
        show(error, ending)
    return error.exit_code


def lose(error: RuntimeError, place: RankInfo) -> int:
    """Return the exit code of a rank that lost rank 0 before the attempt had a number.

    Any other error is raised again.
    """
    from everstep.trainer.distributed.mesh import lost_peer

    if not lost_peer(error):
        raise error
    if AGENT_PID in os.environ:
        return LOST_PEER
    print(f"rank {place.rank} lost rank 0 before the start: {reason_of(error)}", file=sys.stderr)
    return 1


def show(error: BaseException, ending: Ending, log: str = "") -> None:
    """Print an error in one line; as a traceback if neither a line of the user's code nor a log is known.

    EVERSTEP_TRACEBACK=1 always prints the traceback.
    """
    asked = os.environ.get("EVERSTEP_TRACEBACK") == "1"
    if ending.outcome is Outcome.preempted:
        print(f"{ending.reason}; what came after the last checkpoint is not saved", file=sys.stderr)
        return
    if isinstance(error, EverstepError) and not asked:
        # A config is the same on all ranks; other faults may affect one rank only.
        where = "" if ending.rank == 0 or isinstance(error, ConfigError) else f" (rank {ending.rank})"
        print(printable(f"error: {error}{where}"), file=sys.stderr)
    elif asked or (ending.fault is Fault.user and not ending.place and not log):
        traceback.print_exception(error)
    else:
        traced = f"; EVERSTEP_TRACEBACK=1 shows the traceback{f', and so does {log}' if log else ''}"
        print(f"error: {ending.reason}{_where(ending)}{traced}", file=sys.stderr)


def _where(ending: Ending) -> str:
    words = [ending.place] if ending.place else []
    words += [f"rank {ending.rank}"] if ending.rank else []
    return f" ({', '.join(words)})" if words else ""
