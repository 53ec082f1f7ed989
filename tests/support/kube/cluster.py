"""A simulated Kubernetes: API server, scheduler and controllers in this process, and nodes that speak to it by HTTP.

It is no Kubernetes. It does, case by case, what a real 1.36 was measured to do with a job of ours; test_conformance.py
lists the cases. Times are scaled: `scale` seconds here are one second there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.kube.api_server import Server
from support.kube.events import Events
from support.kube.job_controller import Jobs
from support.kube.node_agent import HEARTBEAT_S, ROOM, Agent
from support.kube.node_lifecycle import OUT_OF_SERVICE, Lifecycle
from support.kube.node_process import Process
from support.kube.object_store import ApiError, Plain, Store, key_of, labelled
from support.kube.scheduler import Scheduler
from support.kube.wire import Wire
from support.processes import until

TICK_S = 0.02


@dataclass
class Cluster:
    folder: Path
    scale: float = 0.05
    certificate: tuple[str, str] | None = None
    """Files of a certificate and its key, for TLS. Whoever speaks to the server shows the same."""
    nodes: dict[str, Agent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store()
        self.store.create(("namespaces", "", "default"), {"kind": "Namespace", "metadata": {"name": "default"}})
        self.server = Server(self.store, 60.0 * self.scale, self.certificate)
        events = Events(self.store)
        self.jobs = Jobs(self.store, events, self.scale)
        self.scheduler = Scheduler(self.store, events)
        self.lifecycle = Lifecycle(self.store, self.server, events, self.scale)
        self._over = threading.Event()
        self.errors: list[str] = []
        self.kubeconfig = self.folder / "kubeconfig"
        authority, user = {}, {}
        if self.certificate is not None:
            authority = {"certificate-authority": self.certificate[0]}
            user = {"client-certificate": self.certificate[0], "client-key": self.certificate[1]}
        context = {"cluster": "c", "user": "u", "namespace": "default"}
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "simulated",
            "clusters": [{"name": "c", "cluster": {"server": self.server.url, **authority}}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "simulated", "context": context}]}))  # fmt: skip
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @staticmethod
    @contextlib.contextmanager
    def up(
        folder: Path, nodes: int, scale: float = 0.05, certificate: tuple[str, str] | None = None, **capacity: str
    ) -> Iterator[Cluster]:
        made = Cluster(folder, scale, certificate)
        for number in range(nodes):
            made.add_node(f"n{number}", **capacity)
        made._thread.start()
        try:
            yield made
        finally:
            made._over.set()
            made._thread.join()
            for node in made.nodes.values():
                node.stop()
            made.server.close()

    def add_node(self, name: str, **capacity: str) -> None:
        """Its agent is the one that serves other control planes too, here in threads of this process."""
        given = {key.replace("_", "/"): value for key, value in capacity.items()}
        self.nodes[name] = Agent(Wire(self.kubeconfig), name, self.folder / "nodes" / name,
                                 max(HEARTBEAT_S * self.scale, 0.5), {**ROOM, **given})  # fmt: skip
        self.nodes[name].start()

    # What a test does to it

    def evict(self, pod: Plain) -> None:
        self.server.evict(key_of(pod))

    def delete(self, pod: Plain, grace_s: float | None = None) -> None:
        self.server.delete(key_of(pod), {} if grace_s is None else {"gracePeriodSeconds": grace_s}, {})

    def out_of_service(self, name: str) -> None:
        self.lifecycle.taint(name, OUT_OF_SERVICE, "NoExecute")

    def remove_node(self, name: str) -> None:
        self.store.remove(("nodes", "", name))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nobody can be asked or told: neither by us, nor by controllers and nodes."""
        self.server.away.set()
        until(lambda: self.server.listeners == 0)
        try:
            yield
        finally:
            self.server.away.clear()

    # What a test asks

    def process(self, pod: Plain) -> Process:
        found = self.nodes[pod["spec"]["nodeName"]].pods[pod["metadata"]["uid"]].process
        assert found is not None
        return found

    def pods(self, job: str | None = None, phase: str | None = None) -> list[Plain]:
        found = self.store.list("pods", fits=labelled({} if job is None else {"job-name": job}))
        return [pod for pod in found if phase in (None, pod["status"]["phase"])]

    def job(self, name: str) -> Plain:
        return self.store.get(("jobs", "default", name))

    # What it does by itself

    def _loop(self) -> None:
        while not self._over.wait(TICK_S):
            if self.server.away.is_set():  # all of them only speak to the API server
                continue
            try:
                self._control()
            except ApiError as error:
                if error.code not in (404, 409):  # others may have been faster, as on any cluster
                    self.errors.append(str(error))

    def _control(self) -> None:
        self.scheduler.sync()
        self.lifecycle.sync()
        self.jobs.sync()


def main(folder: str, scale: str) -> str | int:
    """The control plane alone, in a process of its own, until its input ends."""
    with Cluster.up(Path(folder), 0, float(scale)) as made:
        print(made.kubeconfig, flush=True)
        sys.stdin.read()
    return f"{made.errors}" if made.errors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
