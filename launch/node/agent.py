"""Agent on every node of a job: check the node, rendezvous with the others, train.

Started as `python -m everstep.launch.node.agent RUN_FOLDER [--spec DIGEST]`. It does not depend on the scheduler:
`Allocation` has read the environment. It makes no decision: it reports the state of the node and exits with the code of
its ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from everstep.errors import EverstepError, StorageError
from everstep.launch import torchrun
from everstep.launch.config import processes, threads
from everstep.launch.config.notify import NotifyConfig
from everstep.launch.console import say
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.job_start.fork_server import ForkServer
from everstep.launch.job_start.local_start import SLACK_S, LeftAtOnce, Local
from everstep.launch.job_start.output_capture import Output
from everstep.launch.job_start.rank_starter import RankStarter
from everstep.launch.job_start.signals import Signals
from everstep.launch.job_start.start_record import NodeReport, Start
from everstep.launch.node import token
from everstep.launch.node.checks import BadNode, address, failures
from everstep.launch.restart.supervisor import marker
from everstep.launch.runs.notifier import Notifier
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.submit.snapshot import open_code, search_path
from everstep.rank_env import WORLD
from everstep.run_folder import GRACE, STARTER, RunFolder
from everstep.security.job_secrets import START_KEY, TOKEN, start_key

START = "EVERSTEP_START"
"""Environment variable: number of this start in the run folder."""
BAD_NODE = 78
"""Exit code of a node that failed its checks."""
TOLD_SKEW_S, MOST_SKEW_S = 2.0, 300.0
"""Seconds between a node's clock and the head's above which it is reported, or the node is refused."""
SCRIPT_IDLE_S = 400.0
"""Seconds that torchrun may run without workers: it waits up to 300 s for those of other nodes to end."""
PORTS = 20000
"""First port for the rendezvous, and the number of ports."""


def main(arguments: Sequence[str]) -> int:
    folder, spec = RunFolder(arguments[0]), spec_of(arguments[1:])
    with Signals() as signals:  # before anything slow, so that no signal is lost
        try:
            node = Node(folder, Allocation.of(os.environ), JobSpec.submitted(folder, spec), signals)
            try:
                return node.run()
            finally:
                if node.fork_server is not None:
                    node.fork_server.close()
        except EverstepError as error:
            say(str(error))
            return error.exit_code


def spec_of(arguments: Sequence[str]) -> str | None:
    """Return the digest after --spec; None for a folder that a user starts by hand."""
    return arguments[1] if len(arguments) == 2 and arguments[0] == "--spec" else None


@dataclass
class Node:
    """This node in one start."""

    folder: RunFolder
    allocation: Allocation
    submitted: JobSpec
    signals: Signals
    number: int | None = None
    """Number of the start; None reads it from the environment."""
    fork_server: ForkServer | None = field(default=None, repr=False)
    """Kept from the last start on this node, and for the next one; the caller closes it."""
    _key: str | None = field(default=None, repr=False)
    """Key of the start, which the nodes share; None on one node, whose agent makes one."""

    def __post_init__(self) -> None:
        self.start = Start(self.folder, int(os.environ[START]) if self.number is None else self.number)
        leave = marker(self.folder) if self.submitted.is_trainer else lambda reason: None
        # Slurm signals all processes of a step, so no relay is needed; the marker is for processes still starting.
        self.local = Local(self.signals, leave, self.submitted.job.grace_s, relay=self.allocation.scheduler != "slurm")

    def run(self) -> int:
        """Return the exit code of this node's ranks, or BAD_NODE."""
        job, host = self.submitted.job, self.allocation.host
        # If the scheduler has given the address, the check of addresses is not needed.
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
        head = self.allocation.rank == 0 and self.submitted.is_trainer
        with output, Notifier(self.folder, self.name, job.notify if head else NotifyConfig()):
            code = self._train(meeting, output.descriptor)
        name, line = output.cause() if code else (None, "")
        told = None if self.local.handed_over is None else json.loads(self.local.handed_over.to_json())
        self._report(NodeReport(host, (), code, self.local.stopped, name, line, ending=told))
        if code and self.start.is_left_behind():
            # A bad exit code would make srun end the step by its number, which is also that of the new start's step.
            say(f"node {host}: the job has started again elsewhere")
            return 0
        return code

    @property
    def name(self) -> str:
        return self.folder.url.rstrip("/").rpartition("/")[2]

    def _refuse(self, failed: Sequence[str]) -> int:
        self._report(NodeReport(self.allocation.host, tuple(failed)))
        for line in failed:
            say(f"node {self.allocation.host}: {line}")
        return BAD_NODE

    def _report(self, report: NodeReport) -> None:
        """Record the state of the node; a run folder that cannot be written is no reason to fail."""
        try:
            self.start.report(report)
        except (OSError, StorageError) as error:
            say(f"node {report.host}: not written down ({error})")

    def _train(self, meeting: torchrun.Rendezvous, output: int) -> int:
        job = self.submitted.job
        nproc = processes(job)
        alone = len(self.allocation.hosts) == 1 and nproc == 1 and self.submitted.is_trainer
        program = self.program()
        argv = [sys.executable, *program] if alone else torchrun.agent(program, nproc, job.grace_s, meeting)
        self.local.agent = not alone
        self.local.idle_s = job.grace_s + SLACK_S if self.submitted.is_trainer else SCRIPT_IDLE_S
        env, warm = self.environment(threads(job, nproc)), job.warm and self.submitted.is_trainer
        starter = RankStarter(self.local, program, env, nproc, warm, self.fork_server)
        try:
            return starter.run(argv, output, meeting, self._key)
        except LeftAtOnce:
            return 130
        finally:
            self.fork_server = starter.server

    def program(self) -> list[str]:
        """Return the program of the ranks; a script in the snapshot is taken from there."""
        script, *rest = self.submitted.argv
        kept = self.code / script if self.code is not None else Path(script)
        return [str(kept), *rest] if self.code is not None and kept.is_file() else [script, *rest]

    @cached_property
    def code(self) -> Path | None:
        """Folder with the submitted code on this node's disk; None if the nodes use their own code."""
        return (
            None
            if self.submitted.code is None
            else open_code(self.folder, self.submitted.code, self.submitted.job.code_mb)
        )

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
        # The processes need the key of their start only; the token is good for all starts of the job.
        base = {name: value for name, value in os.environ.items() if name not in (TOKEN, START_KEY)}
        return torchrun.environment(base, share, extra | ({} if self._key is None else {START_KEY: self._key}))

    def _meet(self) -> torchrun.Rendezvous | None:
        """Return the rendezvous of this start; the head finds a free port and publishes it in the run folder."""
        hosts, place = self.allocation.hosts, self.allocation.rank
        name = f"{self.allocation.job}.{self.allocation.restart}.{self.start.number}"
        if len(hosts) == 1:
            return torchrun.Rendezvous(id=name)
        if place == 0:
            secret = token.offer(self.start, os.environ)
            mine = self._address()
            self.start.announce(f"{mine}:{free_port(self.allocation.job, mine)}", processes(self.submitted.job))
        # The head needs at most as long as its slowest check.
        endpoint = self.start.await_head(self.local.wait, self.submitted.job.check_s + 60)
        if endpoint is None:
            say(f"node {self.allocation.host}: the head node {hosts[0]} has published no address in time")
            return None
        if place != 0:
            secret = token.receive(self.start, os.environ)
            self._compare_clocks(hosts[0])
            self._compare_processes(hosts[0])
        self._key = start_key(secret, name)
        return torchrun.Rendezvous(len(hosts), endpoint, place, name)

    def _address(self) -> str:
        """Return the address at which the other nodes reach this one."""
        interface, told = self.submitted.job.interface, self.allocation.address
        return told if told and interface is None else address(interface)

    def _compare_processes(self, head: str) -> None:
        """Raise BadNode if the head starts another number of processes: ranks are numbered by it."""
        here, there = processes(self.submitted.job), self.start.processes_of_head()
        if self.submitted.is_trainer and there is not None and there != here:
            raise BadNode(f"job.nproc=auto: {here} processes here, {there} on {head}; set job.nproc, or leave it out")

    def _compare_clocks(self, head: str) -> None:
        """Report a clock that differs from the head's; BadNode if by more than MOST_SKEW_S."""
        ahead_s = self.start.ahead_of_head_s()
        if abs(ahead_s) < TOLD_SKEW_S:
            return
        line = f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} that of {head}: fix NTP"
        if abs(ahead_s) > MOST_SKEW_S:
            raise BadNode(f"{line} (at most {MOST_SKEW_S:.0f} s)")
        say(f"node {self.allocation.host}: {line}")


def free_port(job: str, host: str) -> int:
    """Return a free port, derived from the job's number so that concurrent jobs rarely try the same one.

    BadNode if none of 100 is free.
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
