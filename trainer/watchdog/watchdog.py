"""Watchdog of a rank: a thread that sends heartbeats, judges in its turn, and ends a stalled attempt."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from everstep.trainer.watchdog.activity import Activity
from everstep.trainer.watchdog.conclusion import Conclusion, Report
from everstep.trainer.watchdog.dead_man_switch import DeadManSwitch
from everstep.trainer.watchdog.evidence import is_debugged
from everstep.trainer.watchdog.exchange import REQUEST_S, Exchange
from everstep.trainer.watchdog.heartbeat import Heartbeat, Process, limit_of
from everstep.trainer.watchdog.judge import Judge, Verdict
from everstep.trainer.watchdog.straggler import StragglerSearch

LOG = logging.getLogger("everstep")
LONGEST_BEAT_S = 1.0
RANKS_A_SECOND = 500
"""Heartbeats that the host of the store is to serve in a second; a larger world sends them less often."""
LATER_S = 4.0
"""Seconds until a process in which no Python runs ends itself, beyond those until others end it."""
CLOSE_S = 2.0


class Watchdog:
    """Watches from its construction, on all ranks at about the same time, until `close`."""

    def __init__(self, activity: Activity, exchange: Exchange, stall_s: float, report: Report, log: Path) -> None:
        """Start the thread; `log` is the file that stacks are dumped to."""
        world = exchange.world
        self.beat_s = min(stall_s / 5, max(LONGEST_BEAT_S, world / RANKS_A_SECOND))
        self.stall_s = stall_s
        self._activity = activity
        self._exchange = exchange
        self._report = report
        self._process = Process.own(_open(log), activity.share())
        self._switch = DeadManSwitch(self._process.stacks)
        self._judge = Judge(exchange.rank, world, stall_s, min(max(4 * self.beat_s, 2.0), stall_s / 2))
        self._stragglers = StragglerSearch()
        self._beat = 0
        self._resumed = time.monotonic()
        """Time at which this process was last seen to resume; no activity is older."""
        self._closed = threading.Event()
        self._concluding = threading.Event()
        self._is_behind = False
        self._switch.arm(LATER_S + stall_s)  # now: before the first heartbeat Python's lock may be lost already
        exchange.send(self._heartbeat(self._resumed))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch. While a stall is being reported this does not return: the process is about to end."""
        self._closed.set()
        self._thread.join(None if self._concluding.is_set() else CLOSE_S)
        if self._concluding.is_set():
            self._thread.join()
        self._switch.close()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self.beat_s):
            now = time.monotonic()
            # Clocks run on while a process is suspended, or starved by others: that time says nothing about its work.
            if now - last > max(self.stall_s / 2, 2 * self.beat_s) or is_debugged():
                self._resumed = now
                self._judge.resume(now)
                self._stragglers.restart()
            last = now
            if (verdict := self._look(now)) is not None:
                self._concluding.set()
                Conclusion(verdict, self._exchange, self._process, self._report).run()
        self._take_leave()

    def _look(self, now: float) -> Verdict | None:
        """Send a heartbeat and read those of others; return the verdict that all ranks follow."""
        # A request may hang with the host of the store; only Python's lock is to count.
        self._switch.arm(LATER_S + (self.stall_s if self._exchange.is_alone else max(self.stall_s, 1.5 * REQUEST_S)))
        try:
            self._exchange.send(self._heartbeat(now))
            said, beats = self._exchange.read(self._judge.wanted(now))
            proposed = self._judge.see(beats, now) if said is None else None
            if len(beats) == self._exchange.world and self._stragglers.see(beats, now):
                self._activity.stragglers.append(self._stragglers.found)
            if proposed is not None:
                said = self._exchange.decide(proposed.to_json())
            self._is_behind = False
        except Exception as error:  # of torch, or of our client: the store is gone, and the other ranks with it, or not
            self._reconnect(error)
            return None
        finally:
            self._switch.arm(LATER_S + self.stall_s)
        return None if said is None else Verdict.from_json(said)

    def _heartbeat(self, now: float) -> Heartbeat:
        mark, activity = self._activity.mark, self._activity
        self._beat += 1
        return Heartbeat(
            self._beat,
            int(mark.phase),
            mark.step,
            mark.turn,
            max(0.0, now - max(mark.since, self._resumed)),
            limit_of(mark, self.stall_s),
            self._process,
            self._closed.is_set(),
            activity.own_s,
            activity.passes,
        )

    def _reconnect(self, error: Exception) -> None:
        if not self._is_behind:
            LOG.warning("the watchdog cannot reach the other ranks: %s", " ".join(str(error).split())[:200])
        self._is_behind = True
        try:
            self._exchange.reconnect()
        except Exception:
            LOG.debug("the store of this start is still out of reach", exc_info=True)

    def _take_leave(self) -> None:
        try:
            self._exchange.send(self._heartbeat(time.monotonic()))
        except Exception:
            LOG.debug("the other ranks have left before", exc_info=True)


def _open(log: Path) -> int:
    """Return a descriptor of the file, or of one in memory if it cannot be written."""
    try:
        return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return os.memfd_create("stacks") if hasattr(os, "memfd_create") else 2
