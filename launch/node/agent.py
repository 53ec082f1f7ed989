"""`python -m everstep.launch.node.agent RUN_FOLDER`, once on every node of a job: check it, meet the others, train.

It knows no scheduler; `Allocation` has read what there is to know from the environment. Nor does it decide anything:
it reports how the node fared, and exits with the code of its torchrun.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from everstep.errors import EverstepError, StorageError
from everstep.launch import torchrun
from everstep.launch.config import processes, threads
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.output_capture import Output
from everstep.launch.job_start.process import SLACK_S, LeftAtOnce, Local, Signals
from everstep.launch.job_start.start_record import NodeReport, Start
from everstep.launch.messages import say
from everstep.launch.node.checks import BadNode, address, failures
from everstep.launch.restart.supervisor import marker
from everstep.launch.submit.job_spec import Submitted
from everstep.launch.submit.snapshot import open_code, search_path
from everstep.rank_env import WORLD
from everstep.run_folder import GRACE, STARTER, RunFolder

START = "EVERSTEP_START"
"""Environment variable: the number that this start has in the run folder."""
BAD_NODE = 78
"""Exit code of a node that failed its checks."""
TOLD_SKEW_S, MOST_SKEW_S = 2.0, 300.0
"""Seconds between a node's clock and the head's from which it is told, and beyond which the node is not used."""
SCRIPT_IDLE_S = 400.0
"""Seconds for which torchrun may live on without processes: by itself it waits 300 s for other nodes' to end."""
PORTS = 20000
"""Where the ports for the rendezvous begin, and how many there are."""


def main(arguments: Sequence[str]) -> int:
    folder = RunFolder(arguments[0])
    with Signals() as signals:  # before anything slow, so that no signal is lost
        try:
            return Node(folder, Allocation.of(os.environ), Submitted.read(folder), signals).run()
        except EverstepError as error:
            say(str(error))
            return error.exit_code


@dataclass
class Node:
    """This node in one start."""

    folder: RunFolder
    allocation: Allocation
    submitted: Submitted
    signals: Signals
    number: int | None = None
    """Of the start; None is what the environment says."""

    def __post_init__(self) -> None:
        self.start = Start(self.folder, int(os.environ[START]) if self.number is None else self.number)
        leave = marker(self.folder) if self.submitted.is_trainer else lambda reason: None
        # The scheduler signals all processes of a step, so ours need not be told; the marker is for those that start.
        self.local = Local(self.signals, leave, self.submitted.job.grace_s, relay=self.allocation.scheduler != "slurm")

    def run(self) -> int:
        """The exit code of this node's torchrun, or BAD_NODE."""
        job, host = self.submitted.job, self.allocation.host
        # Where the scheduler has said the address, there is none to be found out.
        fellows = 1 if self.allocation.address else len(self.allocation.hosts)
        failed = failures(job, self.folder, host, fellows)
        if failed:
            return self._refuse(failed)
        self._report(NodeReport(host))
        try:
            meeting = self._meet()
        except BadNode as bad:
            return self._refuse([str(bad)])
        if meeting is None:
            self._report(NodeReport(host, code=1, stopped=self.local.stopped))
            return 1
        output = Output(job.all_causes())
        with output:
            code = self._train(meeting, output.descriptor)
        name, line = output.cause() if code else (None, "")
        told = None if self.local.handed_over is None else json.loads(self.local.handed_over.to_json())
        self._report(NodeReport(host, (), code, self.local.stopped, name, line, ending=told))
        if code and self.start.is_left_behind():
            # srun would have the step ended that had a bad exit, by its number: the new start's has the same one.
            say(f"node {host}: the job has started again elsewhere")
            return 0
        return code

    def _refuse(self, failed: Sequence[str]) -> int:
        self._report(NodeReport(self.allocation.host, tuple(failed)))
        for line in failed:
            say(f"node {self.allocation.host}: {line}")
        return BAD_NODE

    def _report(self, report: NodeReport) -> None:
        """Write down how the node fares, if the run folder takes it: that it does not is no reason to fail."""
        try:
            self.start.report(report)
        except (OSError, StorageError) as error:
            say(f"node {report.host}: not written down ({error})")

    def _train(self, meeting: torchrun.Meeting, output: int) -> int:
        job = self.submitted.job
        nproc = processes(job)
        alone = len(self.allocation.hosts) == 1 and nproc == 1 and self.submitted.is_trainer
        program = self.program()
        argv = [sys.executable, *program] if alone else torchrun.agent(program, nproc, job.grace_s, meeting)
        self.local.agent = not alone
        self.local.idle_s = job.grace_s + SLACK_S if self.submitted.is_trainer else SCRIPT_IDLE_S
        try:
            return self.local.run(argv, self.environment(threads(job, nproc)), output)
        except LeftAtOnce:
            return 130

    def program(self) -> list[str]:
        """What torchrun starts; a script of the submitted code is taken from there and not from where it was edited."""
        script, *rest = self.submitted.argv
        kept = self.code / script if self.code is not None else Path(script)
        return [str(kept), *rest] if self.code is not None and kept.is_file() else [script, *rest]

    @cached_property
    def code(self) -> Path | None:
        """The code that was submitted, on this node's own disk; None where the nodes run what they find."""
        return None if self.submitted.code is None else open_code(self.folder, self.submitted.code)

    def environment(self, share: int) -> dict[str, str]:
        job, code = self.submitted.job, self.code
        extra = {GRACE: str(job.grace_s), **job.env, STARTER: self.start.starter}
        if job.interface is not None:
            extra |= {"GLOO_SOCKET_IFNAME": job.interface, "NCCL_SOCKET_IFNAME": job.interface}
        if self.submitted.is_trainer:
            extra |= {WORLD: str(len(self.allocation.hosts) * processes(job))}
        if code is not None:
            given = extra.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
            script = self.program()[0]
            extra |= search_path(code, given, "" if script.startswith("-") else str(Path(script).parent))
        return torchrun.environment(os.environ, share, extra)

    def _meet(self) -> torchrun.Meeting | None:
        """Where the agents of this start meet. The head finds a free port, and says so in the run folder."""
        hosts, place = self.allocation.hosts, self.allocation.rank
        name = f"{self.allocation.job}.{self.allocation.restart}.{self.start.number}"
        if len(hosts) == 1:
            return torchrun.Meeting(id=name)
        interface, told = self.submitted.job.interface, self.allocation.address
        mine = told if told and interface is None else address(interface)
        if place == 0:
            self.start.announce(f"{mine}:{free_port(self.allocation.job, mine)}")
        # The head is as slow as its slowest check at most.
        endpoint = self.start.await_head(self.local.wait, self.submitted.job.check_s + 60)
        if endpoint is None:
            say(f"node {self.allocation.host}: heard nothing of the head node {hosts[0]}")
            return None
        if place != 0:
            self._compare_clocks(hosts[0])
        return torchrun.Meeting(len(hosts), endpoint, mine, place == 0, name)

    def _compare_clocks(self, head: str) -> None:
        """Tell of a clock that differs from the head's. BadNode when it does by more than agents put up with."""
        ahead_s = self.start.ahead_of_head_s()
        if abs(ahead_s) < TOLD_SKEW_S:
            return
        line = f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} that of {head}: fix NTP"
        if abs(ahead_s) > MOST_SKEW_S:
            raise BadNode(f"{line} (at most {MOST_SKEW_S:.0f} s)")
        say(f"node {self.allocation.host}: {line}")


def free_port(job: str, host: str) -> int:
    """A port that nobody on this node uses: the job's own number if possible, so jobs side by side rarely try the same.

    BadNode when none of many can be had.
    """
    first = int("".join(filter(str.isdigit, job)) or "0")
    for offset in range(100):
        port = PORTS + (first + 101 * offset) % PORTS
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise BadNode(f"no free port near {PORTS + first % PORTS}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
