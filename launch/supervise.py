"""Starts a run again and again until its work is done or another start is no use."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

from launch.restart import Decision, back_off_s, decide
from launch.say import say
from launch.schedulers.local import LeftAtOnce, Local
from trainer.errors import StorageError
from trainer.run_folder import STOP_MARKER, Ending, Outcome, RunFolder


@dataclass
class Supervisor:
    """Starts again and again until the work is done or the policy says that another start is no use."""

    folder: RunFolder
    local: Local
    max_restarts: int
    starter: str
    """What stands in the claims of the attempts that are ours; somebody else may start the same run."""

    def run(self, start: Callable[[], int]) -> int:
        restarts, smallest = 0, sys.maxsize
        self.folder.storage.delete(STOP_MARKER)  # of an earlier stop: it would end this start too
        while True:
            before, step = self.folder.attempts(), self.folder.reached_step()
            try:
                code = start()
            except LeftAtOnce:
                say("left at once: what came after the last checkpoint is lost, the rest is not")
                return 130
            if self.local.stopped is not None:
                self.folder.storage.delete(STOP_MARKER)
            ending = self._ending(before, code)
            shrank = ending is None or ending.micro_batch is None or ending.micro_batch < smallest
            progressed = self.folder.reached_step() > step
            decision = decide(ending, restarts, self.max_restarts, progressed, shrank, self.local.stopped)
            self._keep(decision, ending)
            if not decision.go_on:
                return self._exit_code(ending)
            restarts, smallest = decision.restarts, (ending and ending.micro_batch) or smallest
            if not self.local.wait(back_off_s(restarts)):
                say(f"{self.local.stopped}: not started again; the same command goes on from the last checkpoint")
                return Outcome.preempted.exit_code

    def _exit_code(self, ending: Ending | None) -> int:
        if ending is not None:
            return ending.outcome.exit_code
        # Killed because it took too long to stop is stopped all the same: the same command goes on.
        return (Outcome.crashed if self.local.stopped is None else Outcome.preempted).exit_code

    def _ending(self, before: list[int], code: int) -> Ending | None:
        """The word of our attempt of this start; its exit code where it ended before it claimed one."""
        new = [number for number in self.folder.attempts() if number not in before]
        ours = [number for number in new if self.folder.starter(number) == self.starter]
        if not ours:
            said = [outcome for outcome in Outcome if outcome.exit_code == code and code > 1]
            return Ending(said[0], reason="before the first step") if said else None
        ending = self.folder.ending(ours[-1])
        if new[-1] != ours[-1] and (ending is None or ending.outcome is not Outcome.done):
            # To start again would take the run back, and its new owner would do the same, for ever.
            step = 0 if ending is None else ending.step
            return Ending(Outcome.superseded, step, f"attempt {new[-1]} is not of this command")
        return ending

    def _keep(self, decision: Decision, ending: Ending | None) -> None:
        say(decision.reason)
        outcome = None if ending is None else ending.outcome.value
        self.folder.record_restart({"outcome": outcome, **dataclasses.asdict(decision)})


def marker(folder: RunFolder) -> Callable[[str], None]:
    """What leaves the word in the run folder that it is to stop; the trainer looks for it."""

    def leave(reason: str) -> None:
        try:
            folder.storage.write(STOP_MARKER, reason.encode())
        except (OSError, StorageError) as error:  # the signal alone must do
            say(f"could not write the stop marker: {error}")

    return leave
