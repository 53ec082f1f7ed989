"""Process 1 of a pod; it has the part of slurm/run.sbatch on Slurm.

Started as `python -m everstep.launch.node.pod RUN_FOLDER --spec DIGEST`. All pods of a job coordinate through the run
folder, start after start, and stay when one of them is lost: each pod that ends doubles the time that Kubernetes waits
before it starts the next of that index. The pod of index 0 decides about a start that has ended and begins the next one
as soon as all pods are present; the others wait for it.

exit code   0  the run is done                78  do not try again; the last line gives the reason
          143  the pod was asked to stop      75  this pod is healthy but cannot continue
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from everstep.errors import EverstepError, StorageError
from everstep.launch.console import say
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.fork_server import ForkServer
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import Decisions, Start
from everstep.launch.node.agent import Node, spec_of
from everstep.launch.node.pod_membership import PodMember, PodMembership
from everstep.launch.restart import decide
from everstep.launch.restart.job_policy import Action, Evidence
from everstep.launch.restart.local_policy import back_off_s
from everstep.launch.restart.supervisor import marker
from everstep.launch.submit.job_spec import JobSpec, settle
from everstep.run_folder import STOP_MARKER, RunFolder

DONE, WORLD_BROKE, DO_NOT_RETRY, PREEMPTED = 0, 75, 78, 143
POLL_S = 1.0
POLL_REMOTE_S = 5.0
"""Seconds between two polls of a run folder in a store: a hundred pods poll, and requests cost money.

The wait for a replaced pod takes 10 s and more anyway.
"""
GATHER_S = 60.0
"""Seconds to wait for the maximum number of pods, where the job may run with fewer."""
REPORT_S = 10.0
"""Seconds that the head waits after its own end for the other reports; a pod without one is lost."""
STORE_S = 600.0
"""Seconds for which reading an unresponsive run folder is retried."""


class Leave(Exception):
    """The pod ends with this exit code; the message is its last output."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        say(
            f"everstep.launch.node.pod takes RUN_FOLDER --spec DIGEST; it was given {len(arguments)} words; "
            "see everstep submit job=k8s"
        )
        return DO_NOT_RETRY
    folder, spec = RunFolder(arguments[0]), spec_of(arguments[1:])
    with Signals() as signals:  # before anything slow, so that no signal is lost
        code, why = _run(folder, spec, signals)
        if any(signals.take()) and code in (DONE, DO_NOT_RETRY):
            # After a SIGTERM, exit code 0 would complete this index for good, and 78 would fail the whole job.
            code = PREEMPTED
    say(why)
    return code


def _run(folder: RunFolder, spec: str | None, signals: Signals) -> tuple[int, str]:
    try:
        settle(folder, os.environ)
        Pod(folder, Allocation.of(os.environ), JobSpec.submitted(folder, spec), signals).run()
    except Leave as leave:
        return leave.code, str(leave)
    except (StorageError, OSError) as error:
        return WORLD_BROKE, str(error)
    except EverstepError as error:
        return DO_NOT_RETRY, str(error)


@dataclass
class Pod:
    folder: RunFolder
    allocation: Allocation
    submitted: JobSpec
    signals: Signals
    _since: float = field(default_factory=time.monotonic)
    """Time at which the last start ended: the wait for other pods began then."""
    _known: Start | None = None
    """The newest start; its facts do not change, so they are read once."""
    _fork_server: ForkServer | None = field(default=None, repr=False)
    """Kept over the starts; it ends with this process."""

    def __post_init__(self) -> None:
        self.job = self.allocation.job
        self.fewest, self.most = self.submitted.job.node_range
        self.poll_s = poll_s(self.folder)
        self.members = PodMembership(self.folder, self.job)
        self.decisions = Decisions(self.folder)
        self.me = self.members.join(self.allocation.rank, {"address": self.allocation.address or ""})

    def run(self) -> NoReturn:
        """Take part in start after start; ends by raising Leave."""
        last = 0
        while True:
            start = self._await(last)
            last = start.number
            code = self._take_part(start)
            self._since = time.monotonic()
            if self.me.index == 0:
                self._judge(start, code)

    def _await(self, after: int) -> Start:
        """Return the next start that includes this pod."""
        heard = time.monotonic()
        while True:
            waited = time.monotonic() - self._since
            self.signals.wait(POLL_S if waited < GATHER_S else self.poll_s)  # after a long wait, poll less often
            if self.signals.take():
                raise Leave(PREEMPTED, "told to go between two starts")
            try:
                if (start := self._look(after)) is not None:
                    return start
                heard = time.monotonic()
            except (StorageError, OSError) as error:
                if time.monotonic() - heard > STORE_S:
                    raise Leave(WORLD_BROKE, f"the run folder has not answered for {STORE_S:.0f} s: {error}") from error

    def _look(self, after: int) -> Start | None:
        there = self.members.current()
        if there[self.me.index] != self.me:
            raise Leave(WORLD_BROKE, f"pod {self.me.index} has been replaced, and this is what is left of it")
        newest = self._newest()
        if newest is not None and newest.number > after and self.me.host in newest.facts["hosts"]:
            return newest
        if newest is not None and (decision := self.decisions.of(newest)) is not None:
            if decision["action"] == Action.exit.value:
                code = DONE if decision["exit_code"] == 0 else DO_NOT_RETRY
                raise Leave(code, str(decision["reason"]))
        elif newest is not None and self.me.index == 0:
            # The previous pod of index 0 has ended without a decision.
            self._judge(newest, None)
            return None
        if self.me.index == 0:
            self._claim(newest, there.values())
        return None

    def _newest(self) -> Start | None:
        """Return the newest start of this job; raise Leave if another job has taken the run over."""
        newest = Start.newest(self.folder)
        if newest is not None and self._known is not None and newest.number == self._known.number:
            return self._known
        if newest is None or newest.facts["job"] == self.job:
            self._known = newest
            return newest
        if any(Start(self.folder, number).facts["job"] == self.job for number in Start.numbers(self.folder)):
            raise Leave(DO_NOT_RETRY, f"job {newest.facts['job']} has taken the run over")
        return None

    def _claim(self, before: Start | None, members: Iterable[PodMember]) -> None:
        """Begin the next start if all pods are present, or after GATHER_S if enough of them are."""
        there = self._there(before, members)
        waited = time.monotonic() - self._since
        if len(there) < self.most and (len(there) < self.fewest or waited < GATHER_S):
            return
        self.folder.storage.delete(STOP_MARKER)  # the marker of an earlier stop would end this start too
        hosts = tuple(member.host for member in there[: self.most])
        allocation = Allocation("k8s", self.job, self.me.life - 1, self.me.host, hosts, 0, self.allocation.address)
        start = Start.claim(self.folder, allocation, self.folder.reached_step())
        say(f"start {start.number} of job {self.job} on {', '.join(hosts)}")

    def _there(self, before: Start | None, members: Iterable[PodMember]) -> list[PodMember]:
        """Return the pods that can take part: new ones, and those that reported the end of the last start."""
        said = (
            {report.host for report in before.reports() if report.code is not None and not report.stopped}
            if before
            else set()
        )
        old = set(before.facts["hosts"]) if before else set()
        return sorted(
            member for member in members if member == self.me or member.host not in old or member.host in said
        )

    def _take_part(self, start: Start) -> int:
        """Run one start on this node; return the exit code of its ranks. Leave if this pod was stopped."""
        hosts = tuple(start.facts["hosts"])
        allocation = Allocation(
            "k8s",
            self.job,
            int(start.facts["restart"]),
            self.me.host,
            hosts,
            hosts.index(self.me.host),
            self.allocation.address,
        )
        node = Node(self.folder, allocation, self.submitted, self.signals, start.number, self._fork_server)
        with Watch(self, start) as watch:
            node.local.abandon = watch.changed.is_set
            code = node.run()
        self._fork_server = node.fork_server
        if node.local.stopped is not None:
            raise Leave(PREEMPTED, f"{node.local.stopped}: stopped, and goes on in another pod")
        if any(report.host == self.me.host and report.failed for report in start.reports()):
            raise Leave(1, "this node failed its checks; another pod may get a better one")
        return code

    def _judge(self, start: Start, code: int | None) -> None:
        """Decide about a start that has ended; `code` is None if its head was lost before it decided."""
        silent = self._silent(start)
        reports = start.reports()
        taken = bool(silent) or any(report.stopped for report in reports) or replaced(start, self.members.current())
        evidence = Evidence(code=code or 0, lost=code is None, noticed=taken, disrupted=taken)
        decided = decide.keep(start, decide.decide(start, self.submitted, evidence), self.submitted.job.notify)
        if decided.action is not Action.exit:
            self.signals.wait(back_off_s(decided.restarts))

    def _silent(self, start: Start) -> set[str]:
        """Return hosts without a final report after REPORT_S, in which running pods can write theirs."""
        deadline = time.monotonic() + REPORT_S
        while True:
            said = {report.host for report in start.reports() if report.code is not None or report.failed}
            silent = set(start.facts["hosts"]) - said - {self.me.host}
            if not silent or time.monotonic() > deadline:
                return silent
            self.signals.wait(0.2)


def replaced(start: Start, members: Mapping[int, PodMember]) -> bool:
    """True if a pod that takes part in the start has been replaced."""
    return not set(start.facts["hosts"]) <= {member.host for member in members.values()}


def poll_s(folder: RunFolder) -> float:
    """Return the seconds between two polls of the run folder while a start runs."""
    return POLL_S if folder.storage.path() is not None else POLL_REMOTE_S


class Watch:
    """Check during a start that its pods are unchanged: its processes may hang for a lost peer."""

    def __init__(self, pod: Pod, start: Start) -> None:
        self.pod = pod
        self.start = start
        self.changed = threading.Event()
        self._over = threading.Event()
        self._asked_to_grow = False
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look_on(self) -> None:
        while not self._over.wait(self.pod.poll_s):
            try:
                self._look()
            except (OSError, EverstepError):  # a store that is unreachable for a while is no reason to stop
                continue

    def _look(self) -> None:
        members = self.pod.members.current()
        if replaced(self.start, members) or max(Start.numbers(self.pod.folder)) > self.start.number:
            self.changed.set()
        taking_part = len(self.start.facts["hosts"])
        if self.pod.me.index == 0 and taking_part < min(len(members), self.pod.most) and not self._asked_to_grow:
            self._asked_to_grow = True
            marker(self.pod.folder)("more pods have come")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
