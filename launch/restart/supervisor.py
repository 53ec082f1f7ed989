"""Restarts of a run on this machine until it is done or another start would not help."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from everstep.errors import StorageError
from everstep.fault import WATCHDOG_SIGNAL
from everstep.launch.console import say
from everstep.launch.job_start.local_start import LeftAtOnce, Local
from everstep.launch.restart.local_policy import Decision, back_off_s, decide
from everstep.outcome import Ending, Outcome
from everstep.run_folder import PROGRESS, STOP_MARKER, RunFolder

T = TypeVar("T")
AGAIN_S = 5.0
"""Seconds between two tries to read or write the run folder."""
PATIENCE_S = 600.0
"""Seconds after which these tries end."""
WATCHDOG_CODE = 128 + WATCHDOG_SIGNAL
"""Exit code of a process that its own watchdog has ended."""
LAST_TRIES, LAST_PAUSE_S = 3, 1.0
"""Tries to write the last decision, and seconds between them; after these it is only printed."""


@dataclass(frozen=True)
class EndedStart:
    """End of a start, as recorded in the run folder."""

    ending: Ending | None
    reached: int
    """Step of the newest checkpoint."""
    stepped: bool = True
    """A step of the run has succeeded, in this attempt or before."""
    repeated: bool = False
    """The same error of the user's code has ended an attempt at the same step before."""


@dataclass
class Supervisor:
    """Start the run again until it is done or the restart policy says that another start would not help."""

    folder: RunFolder
    local: Local
    max_restarts: int
    starter: str
    """Starter in the claims of our attempts; another command may start the same run."""
    _unwritten: list[Callable[[], object]] = field(default_factory=list)
    """Writes that the run folder has not accepted yet, the oldest first."""
    _is_behind: bool = False

    def run(self, start: Callable[[], int]) -> int:
        restarts, smallest = 0, sys.maxsize
        self._remove_marker()  # the marker of an earlier stop would end this start too
        while True:
            before, step = self._read(lambda: (self.folder.attempts(), self.folder.reached_step()))
            try:
                code = start()
            except LeftAtOnce:
                say("left at once: what came after the last checkpoint is lost, the rest is not")
                return 130
            if self.local.stopped is not None:
                self._remove_marker()
            ended = self._ended(before, step, code)
            ending = ended.ending
            shrank = ending is None or ending.micro_batch is None or ending.micro_batch < smallest
            progressed = ended.reached > step
            decision = decide(
                ending,
                restarts,
                self.max_restarts,
                progressed,
                shrank,
                self.local.stopped,
                ended.stepped,
                ended.repeated,
            )
            self._keep(decision, ending)
            if not decision.go_on:
                return self._exit_code(ending)
            restarts, smallest = decision.restarts, (ending and ending.micro_batch) or smallest
            if not self._await_folder():
                say(f"the run folder could not be written for {PATIENCE_S:.0f} s: not started again")
                return self._exit_code(ending)
            if not self.local.wait(back_off_s(restarts)):
                say(f"{self.local.stopped}: not started again; the same command goes on from the last checkpoint")
                return Outcome.preempted.exit_code

    def _exit_code(self, ending: Ending | None) -> int:
        if ending is not None:
            return ending.outcome.exit_code
        # Killed because the stop took too long still counts as stopped: the same command resumes the run.
        return (Outcome.crashed if self.local.stopped is None else Outcome.preempted).exit_code

    def _ended(self, before: list[int], step: int, code: int) -> EndedStart:
        def look() -> EndedStart:
            ending, reached = self._ending(before, code), self.folder.reached_step()
            if ending is None or ending.outcome is not Outcome.crashed:
                return EndedStart(ending, reached)
            newest = max(self.folder.attempts(), default=0)
            return EndedStart(ending, reached, self.folder.has_stepped(), self.folder.is_repeated(newest, ending))

        return self._read(look, EndedStart(self.local.handed_over or _by_code(code), step))

    def _ending(self, before: list[int], code: int) -> Ending | None:
        """Return the ending of our attempt: from the run folder, else from the trainer, else by exit code."""
        new = [number for number in self.folder.attempts() if number not in before]
        ours = [number for number in new if self.folder.starter(number) == self.starter]
        told = self.local.handed_over
        if not ours:
            return told or _by_code(code)
        ending = self.folder.ending(ours[-1])
        if told is not None and code == WATCHDOG_CODE:
            told = dataclasses.replace(told, outcome=Outcome.stalled)
        if told is not None and (ending is None or ending.lost_peer):
            step = told.step or (ending.step if ending else int(self.folder.facts(PROGRESS).get("step", 0)))
            said = ending = dataclasses.replace(told, step=step, time=time.time())
            self._write(lambda: self.folder.end(ours[-1], said))
        if new[-1] != ours[-1] and (ending is None or ending.outcome is not Outcome.done):
            # Another start would take the run back, and its new owner would do the same, without end.
            step = 0 if ending is None else ending.step
            return Ending(Outcome.superseded, step, f"attempt {new[-1]} is not of this command")
        return ending

    def _read(self, look: Callable[[], T], otherwise: T | None = None) -> T:
        """Read the run folder, retrying while it cannot be read; return `otherwise` after PATIENCE_S."""
        deadline, told = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                return look()
            except (OSError, StorageError) as error:
                if not told:
                    say(f"waiting for the run folder: {error}")
                    told = True
                if not self.local.wait(AGAIN_S) or time.monotonic() > deadline:
                    if otherwise is None:
                        raise
                    return otherwise

    def _keep(self, decision: Decision, ending: Ending | None) -> None:
        say(decision.brief or decision.reason)
        outcome = None if ending is None or self.local.killed else ending.outcome.value
        facts = {"outcome": outcome, **dataclasses.asdict(decision), "time": time.time()}
        self._write(lambda: self.folder.record_restart(facts))
        for _ in range(0 if decision.go_on else LAST_TRIES):
            if self._unwritten:
                time.sleep(LAST_PAUSE_S)
                self._write()

    def _await_folder(self) -> bool:
        """Wait until the run folder has accepted all pending writes: until then a start would only fail."""
        deadline = time.monotonic() + PATIENCE_S
        while self._unwritten and self.local.wait(AGAIN_S):
            self._write()
            if time.monotonic() > deadline:
                return False
        return True

    def _write(self, what: Callable[[], object] | None = None) -> None:
        """Write `what` after all pending writes; keep what the run folder does not accept now."""
        self._unwritten += [what] if what is not None else []
        while self._unwritten:
            try:
                self._unwritten[0]()
            except (OSError, StorageError) as error:
                if not self._is_behind:
                    say(f"not written down yet, which costs the run nothing: {error}")
                self._is_behind = True
                return
            del self._unwritten[0]
        self._is_behind = False

    def _remove_marker(self) -> None:
        try:
            self.folder.storage.delete(STOP_MARKER)
        except (OSError, StorageError) as error:  # a read-only disk, most likely without a marker
            say(f"could not remove the stop marker: {error}")


def _by_code(code: int) -> Ending | None:
    """Return the ending that the exit code implies, for a start that recorded no outcome."""
    said = [outcome for outcome in Outcome if outcome.exit_code == code and code > 1]
    return Ending(said[0], reason="before the first step") if said else None


def marker(folder: RunFolder) -> Callable[[str], None]:
    """Return a function that writes the stop marker, which the trainer polls, into the run folder."""

    def leave(reason: str) -> None:
        try:
            folder.storage.write(STOP_MARKER, reason.encode())
        except (OSError, StorageError) as error:  # then the signal alone has to stop the trainer
            say(f"could not write the stop marker: {error}")

    return leave
