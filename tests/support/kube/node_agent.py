"""A node for any control plane: it registers itself, gives signs of life, and runs its pods.

    PYTHONPATH=tests python -m support.kube.node_agent --kubeconfig FILE --node NAME --folder DIR

It stands for a kubelet where there is none, and speaks to the API server alone: a Node and its Lease, a watch of its
pods, pods/status, the removal of those that have ended, events, and logs, as the server asks a kubelet for them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from support.kube.node_container import NotStarted, why_plain
from support.kube.node_logs import logs_of
from support.kube.node_pod import OVER, Seen
from support.kube.node_process import Plain, Process, now
from support.kube.wire import MERGE, Refused, Wire

TICK_S, PAUSE_S, AGAIN_S, HEARTBEAT_S = 0.05, 0.2, 1.0, 10.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
NOWHERE = ".invalid"
"""No registry can have such a host: what is to be pulled from there is not found, here as anywhere."""
ROOM = {"cpu": "8", "memory": "64Gi", "pods": "50"}
"""What a node has where nobody says anything else."""


@dataclass
class Agent:
    """`silent` is a node that is cut off: its processes go on. `die` is one that has lost its power."""

    wire: Wire
    name: str
    folder: Path
    heartbeat_s: float = HEARTBEAT_S
    room: Plain = field(default_factory=dict)
    silent: bool = False
    pods: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._over, self._lock = threading.Event(), threading.RLock()
        self._logs = ThreadingHTTPServer(("127.0.0.1", 0), logs_of(self.log_of))
        self._logs.daemon_threads = True

    def start(self, certificate: tuple[str, str] | None = None) -> None:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._logs.socket = context.wrap_socket(self._logs.socket, server_side=True)
        self.register()
        loops = [(self.heartbeat_s, self.beat), (TICK_S, self.tend), (PAUSE_S, self.listen)]
        for each in (lambda: self._logs.serve_forever(TICK_S), *(self._every(*loop) for loop in loops)):
            threading.Thread(target=each, daemon=True).start()

    def die(self) -> None:
        """No sign of life, and nothing runs."""
        self.silent = True
        self.stop()

    def stop(self) -> None:
        self._over.set()
        with self._lock:
            for seen in self.pods.values():
                if seen.process is not None:
                    seen.process.kill()
            self.pods = {}
        self._logs.shutdown()
        self._logs.server_close()

    def log_of(self, namespace: str, pod: str) -> Path | None:
        found = [seen.process.log for seen in list(self.pods.values()) if seen.process is not None
                 and [namespace, pod] == [seen.pod["metadata"]["namespace"], seen.pod["metadata"]["name"]]]  # fmt: skip
        return found[0] if found else None

    def _every(self, pause_s: float, work: Callable[[], None]) -> Callable[[], None]:
        def loop() -> None:
            while not self._over.wait(pause_s):
                # Whoever does not answer now is asked again; so is a server that was faster than we are.
                with contextlib.suppress(OSError, Refused, ValueError):
                    if not self.silent:
                        work()

        return loop

    # The node

    def register(self) -> None:
        node = {"apiVersion": "v1", "kind": "Node",
                "metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name}}}  # fmt: skip
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.name}}
        self._made("/api/v1/nodes", node)
        self._made(LEASES, {**lease, "spec": self._lease()})
        self.wire.ask("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": {
            "capacity": self.room, "allocatable": self.room,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the agent runs"}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._logs.server_port}}}}, MERGE)  # fmt: skip

    def beat(self) -> None:
        self.wire.ask("PATCH", f"{LEASES}/{self.name}", {"spec": self._lease()}, MERGE)
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
        self.wire.ask("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": {"conditions": [ready]}}, MERGE)

    def _lease(self) -> Plain:
        return {"holderIdentity": self.name, "leaseDurationSeconds": 40, "renewTime": now()}

    def _made(self, path: str, thing: Plain) -> None:
        with contextlib.suppress(Refused):  # it was there before: the node comes back
            self.wire.ask("POST", path, thing)

    # Its pods

    def listen(self) -> None:
        """One list and one watch; when that ends, again."""
        path = f"/api/v1/pods?fieldSelector={quote(f'spec.nodeName={self.name}')}"
        found = self.wire.ask("GET", path)
        for uid in set(self.pods) - {pod["metadata"]["uid"] for pod in found["items"]}:
            self._forget(uid)
        for pod in found["items"]:
            self._hear(pod)
        for what, pod in self.wire.watch(f"{path}&watch=1&resourceVersion={found['metadata']['resourceVersion']}"):
            if what == "ERROR" or self.silent or self._over.is_set():
                return
            if what == "DELETED":
                self._forget(pod["metadata"]["uid"])
            elif what != "BOOKMARK":
                self._hear(pod)

    def _hear(self, pod: Plain) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            if uid in self.pods:
                self.pods[uid].pod = pod
            elif not self.silent and not self._over.is_set():
                self.pods[uid] = Seen(pod)

    def _forget(self, uid: str) -> None:
        """It was removed, by force too: nothing of it goes on."""
        with self._lock:
            seen = self.pods.pop(uid, None)
            if seen is not None and seen.process is not None:
                seen.process.kill()

    def tend(self) -> None:
        for uid, seen in list(self.pods.items()):
            with self._lock, contextlib.suppress(OSError, Refused):  # one pod's trouble is not the others'
                if uid in self.pods and not self.silent:
                    self._tend(seen)

    def _tend(self, seen: Seen) -> None:
        meta = seen.pod["metadata"]
        if (
            seen.process is None
            and seen.status.get("phase", "Pending") == "Pending"
            and time.monotonic() > seen.again_at
        ):
            seen.again_at = time.monotonic() + AGAIN_S
            self._begin(seen)
        if seen.process is not None and seen.status["phase"] not in OVER:
            if "deletionTimestamp" in meta:
                if seen.process.told_at is None:
                    self._event(seen.pod, "Normal", "Killing", f"Stopping container {seen.name}")
                seen.process.end(float(meta.get("deletionGracePeriodSeconds") or 0))
            if (state := seen.process.tend()) is not None:
                phase = "Failed" if state["terminated"]["exitCode"] else "Succeeded"
                seen.say(phase, state)
        elif "deletionTimestamp" in meta and seen.status.get("phase") == "Pending":
            seen.say("Failed", None)
        if seen.told != seen.status:
            self._tell(seen)
        elif seen.status.get("phase") in OVER and meta.get("deletionGracePeriodSeconds"):
            self._ask_for(seen.pod, "DELETE", "", {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}})

    def _begin(self, seen: Seen) -> None:
        pod, image = seen.pod, seen.container["image"]
        phase = pod["status"].get("phase", "Pending")
        if phase in OVER:
            seen.status = seen.told = {"phase": phase}
        elif phase == "Running":  # begun by an agent that is gone, and its processes with it
            lost = {"exitCode": 137, "reason": "ContainerStatusUnknown",
                    "message": "The container could not be located when the pod was terminated"}  # fmt: skip
            seen.say("Failed", {"terminated": {**lost, "finishedAt": now()}})
        elif "deletionTimestamp" in pod["metadata"]:
            seen.say("Failed", None)
        elif image.split("/")[0].endswith(NOWHERE):
            why = f'failed to pull image "{image}": failed to resolve reference "{image}": no such host'
            seen.say("Pending", {"waiting": {"reason": "ErrImagePull", "message": why}})
            self._event(pod, "Warning", "Failed", f'Failed to pull image "{image}": {why}')
        else:
            self._run(seen)

    def _run(self, seen: Seen) -> None:
        pod, image = seen.pod, seen.container["image"]
        try:
            seen.process = Process(pod, self.name, self.folder / pod["metadata"]["uid"], self._reader(pod))
        except NotStarted as error:
            ended = {
                "exitCode": 128,
                "reason": "StartError",
                "message": f"failed to start: {error}",
                "finishedAt": now(),
            }
            seen.say("Failed", {"terminated": ended})
            self._event(pod, "Warning", "Failed", f"Error: {error}")
        except Refused as error:
            if error.code != 404:
                raise
            waiting = {"reason": "CreateContainerConfigError", "message": str(error)}
            seen.say("Pending", {"waiting": waiting})
            self._event(pod, "Warning", "Failed", f"Error: {error}")
        else:
            seen.say("Running", {"running": {"startedAt": seen.process.started}})
            for reason, said in (("Pulled", f'Container image "{image}" already present on machine'),
                                 ("Created", f"Created container: {seen.name}"),
                                 ("Started", f"Started container {seen.name}")):  # fmt: skip
                self._event(pod, "Normal", reason, said)

    def _tell(self, seen: Seen) -> None:
        """The whole status, for this very pod: another of its name is none of ours. What fails is said again."""
        status, uid = seen.status, seen.pod["metadata"]["uid"]
        if self._ask_for(seen.pod, "PATCH", "/status", {"metadata": {"uid": uid}, "status": status}):
            seen.told = status

    def _ask_for(self, pod: Plain, method: str, sub: str, body: Plain) -> bool:
        """False when it has to be asked again."""
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}{sub}"
        try:
            self.wire.ask(method, path, body, MERGE if method == "PATCH" else "application/json")
        except Refused as error:
            return error.code in (404, 409)  # it is gone, which the watch will say
        except OSError:
            time.sleep(TICK_S)
            return False
        return True

    def _reader(self, pod: Plain) -> Callable[[str], Plain]:
        return lambda path: self.wire.ask("GET", f"/api/v1/namespaces/{pod['metadata']['namespace']}/{path}")

    def _event(self, pod: Plain, kind: str, reason: str, message: str) -> None:
        """As a kubelet records it; one that is lost is no harm."""
        meta, time_ = pod["metadata"], now()
        about = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "namespace": meta["namespace"],
                 "uid": meta["uid"]}  # fmt: skip
        made = {"apiVersion": "v1", "kind": "Event", "type": kind, "reason": reason, "message": message, "count": 1,
                "metadata": {"name": f"{meta['name']}.{time.time_ns():x}", "namespace": meta["namespace"]},
                "involvedObject": about, "firstTimestamp": time_, "lastTimestamp": time_,
                "source": {"component": "kubelet", "host": self.name}, "reportingComponent": "kubelet",
                "reportingInstance": self.name}  # fmt: skip
        with contextlib.suppress(OSError, Refused):
            self.wire.ask("POST", f"/api/v1/namespaces/{meta['namespace']}/events", made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubeconfig", required=True, type=Path)
    parser.add_argument("--node", required=True)
    parser.add_argument("--folder", required=True, type=Path, help="where logs and mounted files are kept")
    parser.add_argument("--heartbeat", type=float, default=HEARTBEAT_S, help="seconds between two signs of life")
    parser.add_argument("--room", type=json.loads, default=ROOM, help="what it has, as JSON")
    parser.add_argument("--certificate", nargs=2, metavar=("CERT", "KEY"), help="serve logs over TLS, as a real API "
                        "server wants it")  # fmt: skip
    given: Any = parser.parse_args()
    agent = Agent(Wire(given.kubeconfig), given.node, given.folder / given.node, given.heartbeat, given.room)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    if why := why_plain():
        print(f"node {given.node}: containers are plain processes: {why}", file=sys.stderr)
    agent.start(tuple(given.certificate) if given.certificate else None)
    print(f"{given.node} {os.getpid()}", flush=True)
    told.wait()
    agent.stop()


if __name__ == "__main__":
    main()
