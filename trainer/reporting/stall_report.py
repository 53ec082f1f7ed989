"""Report of a stalled attempt: a line to the user, outcome, event and evidence in the run folder."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass

from everstep.errors import EverstepError, printable
from everstep.outcome import Ending, Outcome
from everstep.run_folder import EVENTS, RunFolder
from everstep.trainer.reporting.outcome import hand_over
from everstep.trainer.watchdog.activity import Phase
from everstep.trainer.watchdog.conclusion import FLUSH_S, REPORT_S, bounded
from everstep.trainer.watchdog.stall_record import Stall

LOG = logging.getLogger("everstep")
UNDER_WAY = (Phase.data, Phase.forward, Phase.backward, Phase.update)
"""Phases of a step that is not done yet."""


@dataclass(frozen=True)
class StallReport:
    """Writer of one rank, into the folder of an attempt."""

    folder: RunFolder
    attempt: int
    rank: int

    def keep(self, step: int, rank: int, text: str, flight: str | None) -> None:
        """Write the evidence about a rank into stall-STEP/; what the store refuses is left out."""
        base = self.folder.attempt(self.attempt, f"stall-{step:08d}/rank-{rank:04d}")
        try:
            self.folder.storage.write(f"{base}.txt", text.encode())
            if flight is not None:
                self.folder.storage.write(f"{base}.flight.json", flight.encode())
        except (EverstepError, OSError) as error:
            LOG.warning("the evidence about rank %d is not kept: %s", rank, error)

    def end(self, stall: Stall) -> None:
        """Show the stall, and record it as event and outcome of the attempt, within REPORT_S."""
        # In threads: the main thread may hang in this very log, output or store, and hold its lock.
        bounded(lambda: self._show(stall), FLUSH_S)
        ending = ending_of(stall, self.rank)
        if not bounded(lambda: self._write(stall, ending), REPORT_S):
            hand_over(ending)

    def _show(self, stall: Stall) -> None:
        where = self.folder.attempt(self.attempt, f"stall-{stall.step:08d}")
        print(printable(f"error: {stall.reason}; stacks in {self.folder.url}/{where}"), file=sys.stderr, flush=True)
        LOG.error("%s", stall.reason)

    def _write(self, stall: Stall, ending: Ending) -> None:
        event = {
            "event": "stalled",
            "time": time.time(),
            "step": stall.step,
            "seconds": round(stall.seconds, 2),
            "kind": stall.kind.value,
            "culprits": [each.facts() for each in stall.culprits],
            "line": stall.reason,
        }
        try:
            # A part of its own: rank 0, which writes the others, may be the one that is frozen.
            part = EVENTS.replace(".", "-stalled.")
            self.folder.storage.write(self.folder.attempt(self.attempt, part), json.dumps(event).encode() + b"\n")
            self.folder.end(self.attempt, ending)
        except (EverstepError, OSError) as error:
            LOG.error("cannot write down how this ended: %s", error)
            hand_over(ending)


def ending_of(stall: Stall, rank: int) -> Ending:
    first = stall.culprits[0] if stall.culprits else None
    phase = Phase(first.suspect.phase) if first else Phase.backward
    step = max(0, stall.step - 1) if phase in UNDER_WAY else stall.step
    return Ending(
        Outcome.stalled,
        step,
        stall.reason,
        rank=first.suspect.rank if first else rank,
        node=first.suspect.process.host if first else "",
        place=first.evidence.line if first else "",
    )
