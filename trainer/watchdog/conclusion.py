"""Conclusion of a stalled attempt on one rank: keep evidence, report, kill, and leave.

The order matters. The judge reports first, since the survivors' connections break as soon as a rank has died, and they
would then end with a reason that names a victim. Processes that cannot leave are killed by a rank beside them, at once:
the agent would wait for its grace period, and a stopped process ignores all signals but SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from everstep.fault import WATCHDOG_SIGNAL
from everstep.rank_env import AGENT_PID, STALLED
from everstep.trainer.watchdog import evidence as found
from everstep.trainer.watchdog.evidence import Evidence, main_frames, process_facts
from everstep.trainer.watchdog.exchange import Exchange
from everstep.trainer.watchdog.heartbeat import Process
from everstep.trainer.watchdog.judge import Kind, Suspect, Verdict
from everstep.trainer.watchdog.stall_record import Stall, stall_of

LOG = logging.getLogger("everstep")
EVIDENCE_S = 2.0
"""Seconds that the judge waits for evidence; ranks learn of a verdict with their next heartbeat."""
REPORT_S = 5.0
"""Seconds that a run folder may take to accept a report."""
DUMP_S = 0.5
"""Seconds that another process may take to dump its stacks."""
KEEP_S = 1.0
"""Seconds beyond the report that a run folder may take to accept the evidence."""
FLUSH_S = 1.0
"""Seconds that a log or a reader of the output may take."""
POLL_S, DUMP_POLL_S = 0.02, 0.005
STOPPED = "T"


class Report(Protocol):
    """Destination of what is known about a stall."""

    def keep(self, step: int, rank: int, text: str, flight: str | None) -> None:
        """Keep the evidence about a rank."""

    def end(self, stall: Stall) -> None:
        """Record the outcome of the attempt, and show it."""


@dataclass(frozen=True)
class Conclusion:
    verdict: Verdict
    exchange: Exchange
    process: Process
    report: Report

    def run(self) -> NoReturn:
        """Do this rank's part; it ends with the process. What fails must not keep the rest from being done."""
        keeping: list[threading.Thread] = []
        if not self._is_frozen:  # it was, when the verdict was given
            _try(lambda: keeping.append(self._testify()))
        _try(self._report if self.exchange.rank == self.verdict.judge else self._await_report)
        for thread in keeping:
            thread.join(KEEP_S)
        for suspect in self._charges:
            kill(suspect.process, self.process, signal.SIGKILL)
        leave()

    def _testify(self) -> threading.Thread:
        """Give evidence about this rank and its charges to the judge; return the thread that writes it down."""
        kept = [self._own(), *map(self._examine, self._charges)]
        return _start(lambda: self._keep(kept))

    @property
    def _charges(self) -> list[Suspect]:
        """Frozen ranks beside this one that it has to examine and to end."""
        frozen = self.verdict.suspects if self.verdict.kind is Kind.frozen else ()
        return [each for each in frozen if each.witness == self.exchange.rank]

    @property
    def _is_frozen(self) -> bool:
        ranks = [each.rank for each in self.verdict.suspects]
        return self.verdict.kind is Kind.frozen and self.exchange.rank in ranks

    def _own(self) -> tuple[int, str, str | None]:
        text, flight = found.dump_stacks(), found.flight_record()
        frames = main_frames(text, self.process.main_thread)
        facts, rank = process_facts(self.process.pid), self.exchange.rank
        self.exchange.give(rank, Evidence(frames, facts, found.collectives_in(flight)).pack())
        return rank, _text(facts, text), flight

    def _examine(self, suspect: Suspect) -> tuple[int, str, str | None]:
        facts, mark = process_facts(suspect.process.pid), found.mark_of(suspect.process)
        text = dump_of(suspect.process, self.process, stopped=facts["state"] == STOPPED)
        frames = main_frames(text, suspect.process.main_thread)
        self.exchange.give(suspect.rank, Evidence(frames, facts, mark=mark).pack())
        return suspect.rank, _text(facts, text), None

    def _keep(self, kept: Sequence[tuple[int, str, str | None]]) -> None:
        for rank, text, flight in kept:
            self.report.keep(self.verdict.step, rank, text, flight)

    def _report(self) -> None:
        evidence: dict[int, Evidence] = {}
        _try(lambda: evidence.update(self._gather()))
        self.report.end(stall_of(self.verdict, evidence, self.exchange.world))
        self.exchange.release()

    def _gather(self) -> dict[int, Evidence]:
        suspects = self.verdict.suspects
        mute = [each for each in suspects if self.verdict.kind is Kind.frozen and each.witness is None]
        # Of all ranks, not only those named: when this one leaves, the others lose their connections and end.
        _poll(lambda: self.exchange.given >= self.exchange.world - len(mute), EVIDENCE_S)
        given = self.exchange.evidence([each.rank for each in suspects])
        return {rank: Evidence.unpack(each) for rank, each in given.items()}

    def _await_report(self) -> None:
        """Wait until the judge has reported; report in its place, with less evidence, if it does not."""
        if not _poll(self.exchange.is_released, EVIDENCE_S + REPORT_S + 1.0):
            self.report.end(stall_of(self.verdict, {}, self.exchange.world))


def _try(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        said = f"the watchdog could not do all: {error}"
        bounded(lambda: LOG.error("%s", said), FLUSH_S)


def _text(facts: dict[str, object], stacks: str) -> str:
    return "".join(f"{name}: {value}\n" for name, value in facts.items()) + f"\n{stacks}"


def dump_of(process: Process, own: Process, stopped: bool) -> str:
    """Have a process beside this one dump its stacks, from C, and return them; empty if it cannot.

    A stopped process runs for the moment that the dump takes.
    """
    path = f"/proc/{process.pid}/fd/{process.stacks}"
    text = ""
    with contextlib.suppress(OSError):
        before = os.stat(path).st_size
        kill(process, own, WATCHDOG_SIGNAL)
        if stopped:
            kill(process, own, signal.SIGCONT)
        deadline, grown = time.monotonic() + DUMP_S, -1
        while time.monotonic() < deadline and (size := os.stat(path).st_size) != grown:
            grown = size if size > before else -1
            time.sleep(DUMP_POLL_S)
        if stopped:
            kill(process, own, signal.SIGSTOP)
        with open(path, "rb") as file:
            file.seek(before)
            text = file.read(found.LARGEST_STACKS).decode(errors="replace")
    return text


def kill(process: Process, own: Process, number: int) -> None:
    """Send a signal to another rank of this node, if its PID still belongs to a child of our own agent."""
    if process.pid == own.pid or process_facts(process.pid).get("parent") != own.parent:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if number == WATCHDOG_SIGNAL and sys.platform == "linux":
            # To the main thread: another one might dump the stacks of a stopped process after this one has gone on.
            ctypes.CDLL(None).tgkill(process.pid, process.pid, number)
        else:
            os.kill(process.pid, number)


def leave() -> NoReturn:
    """End this process without a collective, whatever its main thread does: it may hold all locks."""
    bounded(_flush, FLUSH_S)
    os._exit(STALLED if AGENT_PID in os.environ else 1)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def bounded(work: Callable[[], object], seconds: float) -> bool:
    """Do `work` in a thread; True if it has ended in time."""
    thread = _start(work)
    thread.join(seconds)
    return not thread.is_alive()


def _start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _poll(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
