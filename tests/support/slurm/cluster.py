"""A real Slurm of several nodes on one machine, from the distribution's packages, without systemd or containers.

Every node is a set of namespaces (network, hostname, mounts, processes, IPC) with its own slurmd, its own address on a
bridge and its own /etc/hosts, so it can be cut off, switched off and started again. All state lies in one folder,
nothing below /etc is touched, and `down` leaves nothing behind. Needs root on Linux.

    PYTHONPATH=tests python -m support.slurm.cluster up 3    prints `export SLURM_CONF=…`; then sbatch, squeue, scontrol
    … cut n2    also heal, power_off, kill_slurmd, start; kill_controller
    … down

ID=0 … 9 in the environment of `up` and its fellows tells clusters apart that run side by side.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.slurm import accounting

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "ip", "nsenter", "unshare")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
HERE = Path(__file__).parent
BOOT = HERE / "boot_node.sh"


def missing() -> str | None:
    """Why no cluster can be had here; None when one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of several nodes needs root on Linux"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        packages = "munge slurmctld slurmd slurm-client iproute2"
        return f"{', '.join(absent)} not installed: apt-get install --no-install-recommends {packages}"
    return None


@dataclass(frozen=True)
class Cluster:
    """One cluster of nodes n1, n2, …; every method returns when what it does is done."""

    id: int
    nodes: int = 3
    cpus: int = 2
    apart: int = 0
    """So many of the last nodes form the partition `apart`, and no other."""
    accounted: bool = False
    """With a slurmdbd (see accounting.py), and with a controller that forgets what is over within seconds."""

    @property
    def state(self) -> Path:
        return Path(f"/run/everstep-slurm-{self.id}")

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which sbatch and its fellows talk to this cluster."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))}
        return {**plain, "SLURM_CONF": str(self.conf), "PATH": PATH}

    def address(self, name: str = "") -> str:
        """Of a node, or of the controller on the bridge."""
        return f"10.{200 + self.id}.0.{10 + int(name[1:]) if name else 1}"

    @property
    def bridge(self) -> str:
        return f"evs{self.id}"

    def netns(self, name: str) -> str:
        return f"evs{self.id}-{name}"

    def cable(self, name: str) -> str:
        """The host's end of a node's network cable."""
        return f"evs{self.id}v{name[1:]}"

    # Life of the whole

    @staticmethod
    def up(nodes: int = 3, cpus: int = 2, apart: int = 0, id: int | None = None, accounted: bool = False) -> Cluster:
        """Bring a cluster up and wait until all nodes are idle; the first free number when `id` is None."""
        numbers = range(10) if id is None else [id]
        cluster = next(found for i in numbers if (found := Cluster(i, nodes, cpus, apart, accounted))._claim())
        try:
            cluster._bring_up()
        except BaseException:
            for log in sorted((cluster.state / "log").glob("*")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-10:], sep="\n", file=sys.stderr)
            cluster.down()
            raise
        return cluster

    def _claim(self) -> bool:
        try:
            self.state.mkdir()
        except FileExistsError:
            return False
        return True

    def _bring_up(self) -> None:
        for name in ("munge", "state", "spool", "log", "pids", "local"):
            (self.state / name).mkdir()
        (self.state / "nodes").write_text(str(self.nodes))
        (self.state / "plugstack.conf").touch()
        self.conf.write_text(configuration(self))
        self._lay_network()
        key = self.state / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{what}={self.state}/munge/{file}" for what, file in
                 (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"),
                  ("seed-file", "seed"))]  # fmt: skip
        self._start("munged", "munged", "--foreground", *files)
        until(lambda: self.ok("munge", "-S", f"{self.state}/munge/socket", "-n"), "munged")
        if self.accounted:
            accounting.start(self)
        self.start_controller()
        for name in self.names:
            self.start(name)
        self.wait_idle(self.names)

    def _lay_network(self) -> None:
        self.run("ip", "link", "add", self.bridge, "type", "bridge")
        self.run("ip", "addr", "add", f"{self.address()}/24", "dev", self.bridge)
        self.run("ip", "link", "set", self.bridge, "up")
        known = [f"{self.address(name)} {name}" for name in self.names]
        hosts = ["127.0.0.1 localhost", f"{self.address()} {socket.gethostname()} ctl", *known]
        (self.state / "hosts").write_text("\n".join(hosts) + "\n")
        # There is no DNS in the nodes: a look-up that files do not answer would hang for 10 s.
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
        kept = [line for line in lines if not line.startswith("hosts:")]
        (self.state / "nsswitch.conf").write_text("\n".join([*kept, "hosts: files"]) + "\n")

    def down(self) -> None:
        """Stop everything and remove every trace."""
        for name in self.names:
            self._kill_node(name)
        for daemon in ("slurmctld", *accounting.DAEMONS, "munged"):
            self._stop(daemon)
        for name in self.names:
            self.ok("ip", "netns", "del", self.netns(name))
            self.ok("ip", "link", "del", self.cable(name))
        self.ok("ip", "link", "del", self.bridge)
        shutil.rmtree(self.state, ignore_errors=True)

    # What can befall a node, and the controller

    def start(self, name: str) -> None:
        """Boot a node; in one that is up only its slurmd is started again."""
        if self._alive(f"init-{name}"):
            self.enter(name, "slurmd", "-N", name, "-f", str(self.conf))
            return
        if not Path(f"/run/netns/{self.netns(name)}").exists():
            self._plug_in(name)
        self.heal(name)
        for folder in (f"spool/{name}", f"local-{name}"):
            (self.state / folder).mkdir(exist_ok=True)
        inside = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc",
                  "bash", str(BOOT), name, str(self.state)]  # fmt: skip
        self._start(f"node-{name}", "nsenter", f"--net=/run/netns/{self.netns(name)}", "--", *inside)
        outer = self._pid(f"node-{name}")
        children = Path(f"/proc/{outer}/task/{outer}/children")
        until(lambda: children.read_text().split() != [], f"first process of {name}")
        (self.state / f"pids/init-{name}").write_text(children.read_text().split()[0])

    def _plug_in(self, name: str) -> None:
        space = self.netns(name)
        self.run("ip", "netns", "add", space)
        self.run("ip", "link", "add", self.cable(name), "type", "veth", "peer", "name", "eth0", "netns", space)
        self.run("ip", "link", "set", self.cable(name), "master", self.bridge)
        self.run("ip", "-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self.run("ip", "-n", space, "link", "set", device, "up")
        self.run("ip", "-n", space, "route", "add", "default", "via", self.address())

    def cut(self, name: str) -> None:
        """Pull the network cable: the node works on, nobody hears of it."""
        self.run("ip", "link", "set", self.cable(name), "down")

    def heal(self, name: str) -> None:
        self.run("ip", "link", "set", self.cable(name), "up")

    def power_off(self, name: str) -> None:
        """The cable first, so no connection is closed in an orderly way; then every process of the node."""
        self.cut(name)
        self._kill_node(name)

    def kill_slurmd(self, name: str) -> None:
        """SIGKILL for slurmd alone; the processes of jobs live on."""
        self.enter(name, "sh", "-c", f"kill -KILL $(cat {self.state}/slurmd-{name}.pid)")

    def kill_controller(self) -> None:
        self._stop("slurmctld", signal.SIGKILL)

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        until(lambda: "is UP" in self.output("scontrol", "ping"), "slurmctld", 30)

    def wait_idle(self, names: list[str], seconds: float = 60) -> None:
        listed = ",".join(names)

        def idle() -> bool:
            shown = self.output("sinfo", "-h", "-N", "-t", "idle", "-n", listed, "-o", "%N")
            return set(shown.split()) == set(names)

        try:
            until(idle, f"idle nodes {listed}", seconds)
        except TimeoutError as late:
            raise TimeoutError(f"{late}: {self.output('scontrol', '-o', 'show', 'nodes', listed)}") from None

    # Commands

    def run(self, *argv: str) -> str:
        """The output of a command of the host; it is repeated while the controller is away, and its error is ours."""
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=False)
            if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def output(self, *argv: str) -> str:
        """What a command prints, whether it succeeds or not."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout

    def ok(self, *argv: str) -> bool:
        return subprocess.run(argv, env=self.env, capture_output=True, timeout=60, check=False).returncode == 0

    def enter(self, name: str, *argv: str) -> str:
        """Run a command inside a node."""
        target = str(self._pid(f"init-{name}"))
        return self.run("nsenter", "-t", target, "-m", "-u", "-i", "-n", "-p", "--", *argv)

    # Processes of the host, by the files in pids/

    def _start(self, what: str, *argv: str) -> None:
        with (self.state / f"log/{what}.out").open("ab") as log:
            process = subprocess.Popen(
                argv, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self.state / f"pids/{what}").write_text(str(process.pid))

    def _pid(self, what: str) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int((self.state / f"pids/{what}").read_text())
        return 0

    def _alive(self, what: str) -> bool:
        try:
            return Path(f"/proc/{self._pid(what)}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
            return False

    def _stop(self, what: str, number: int = signal.SIGTERM) -> None:
        pid = self._pid(what)
        if pid and self._alive(what):
            os.kill(pid, number)
            try:
                until(lambda: not self._alive(what), what, 5)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # a zombie, if it was this very process that started it
            os.waitpid(pid, os.WNOHANG)
        (self.state / f"pids/{what}").unlink(missing_ok=True)

    def _kill_node(self, name: str) -> None:
        """SIGKILL for the first process of the node's namespace takes all the others along."""
        self._stop(f"init-{name}", signal.SIGKILL)
        self._stop(f"node-{name}", signal.SIGKILL)


def configuration(cluster: Cluster) -> str:
    """slurm.conf: as a site has it, except that failures are noticed in seconds and not in minutes."""
    state, base = cluster.state, 18810 + 100 * cluster.id
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={cluster.address(name)} CPUs={cluster.cpus} RealMemory=4000 "
        f"Weight={name[1:]} State=UNKNOWN"
        for name in cluster.names
    )
    most = cluster.names[: cluster.nodes - cluster.apart]
    apart = ",".join(cluster.names[len(most) :])
    partitions = [
        "main Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=24:00:00",
        "spot PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
        "urgent PriorityTier=100 PreemptMode=OFF",
    ]
    lines = [f"PartitionName={partition} Nodes={','.join(most)} State=UP" for partition in partitions]
    lines += [f"PartitionName=apart PreemptMode=OFF Nodes={apart} State=UP"] if apart else []
    partition_lines = "\n".join(lines)
    records = accounting.slurm_conf(cluster) if cluster.accounted else ""
    return f"""\
ClusterName=everstep{cluster.id}
SlurmctldHost={socket.gethostname()}({cluster.address()})
SlurmUser=root
SlurmctldPort={base}
SlurmdPort={base + 1}
AuthType=auth/munge
# cred_expire is also how long a requeued job has to wait before it may start again (120 s by default).
AuthInfo=socket={state}/munge/socket,cred_expire=5
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/%n.log
PlugStackConfig={state}/plugstack.conf
# pgid would lose torchrun's workers, which have sessions of their own; cgroup needs what a container may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes may claim more CPUs than the machine has.
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
# A task whose batch host is lost tries five times to tell it of its end, before the job can be requeued.
TCPTimeout=1
UnkillableStepTimeout=20
# The controller talks to every node itself: a message that goes through a dead node would be late.
TreeWidth=65533
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_resolution=1
ReturnToService=2
JobRequeue=1
MinJobAge={2 if cluster.accounted else 3600}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc={state}/log/jobcomp.txt
{records}{nodes}
{partition_lines}
"""


def until(fits: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not fits():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


def main(verb: str, *rest: str) -> None:
    number = int(os.environ.get("ID", "0"))
    if verb == "up":
        cluster = Cluster.up(int(rest[0]) if rest else 3, id=number)
        print(f"export SLURM_CONF={cluster.conf}")
        return
    state = Cluster(number).state
    if not state.exists():
        sys.exit(f"no cluster {number} is up")
    getattr(Cluster(number, int((state / "nodes").read_text())), verb)(*rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
