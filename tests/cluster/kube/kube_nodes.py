"""The nodes of the simulated cluster: they run what pods say as processes of this machine, and can fail."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from kube_store import ApiError, Plain, Store, now

LAST_WORDS = 2048


class Process:
    """One pod on its node: started, watched, told to end, killed after its grace. Images are not looked at."""

    def __init__(self, node: Node, pod: Plain) -> None:
        self.node, self.key = node, ("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        self.uid = pod["metadata"]["uid"]
        self.folder = node.folder / self.uid
        self.log = self.folder / "log"
        self.told_at: float | None = None
        self.oom = False
        self.folder.mkdir(parents=True)
        self.ip = node.address()
        self.started = now()
        container = pod["spec"]["containers"][0]
        env, places = self._env(container, pod), self._places(container, pod)
        words = [_expand(word, env) for word in (*container.get("command", []), *container.get("args", []))]
        env = {key: _moved(value, places) for key, value in env.items()}
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                          start_new_session=True)  # fmt: skip
        self.name = container["name"]
        self.report("Running", {"running": {"startedAt": self.started}})

    def _env(self, container: Plain, pod: Plain) -> dict[str, str]:
        meta = pod["metadata"]
        told = {"status.podIP": self.ip, "metadata.uid": meta["uid"], "spec.nodeName": self.node.name}
        told |= {f"metadata.annotations['{key}']": value for key, value in meta["annotations"].items()}
        env = {"PATH": os.environ["PATH"], "HOME": "/tmp"}
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                env[each["name"]] = self._secret(**source["secretKeyRef"])
            else:
                env[each["name"]] = told[source["fieldRef"]["fieldPath"]] if source else each.get("value", "")
        return env

    def _secret(self, name: str, key: str) -> str:
        data = self.node.store.get(("secrets", self.key[1], name))["data"]
        return base64.b64decode(data[key]).decode()

    def _places(self, container: Plain, pod: Plain) -> dict[str, Path]:
        """Where mounted folders are instead; those of claims are where they say, so that all nodes share them."""
        volumes = {each["name"]: each for each in pod["spec"].get("volumes", [])}
        places = {}
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            place = self.folder / mount["name"]
            if "configMap" in volume:
                place.mkdir()
                found = self.node.store.get(("configmaps", self.key[1], volume["configMap"]["name"]))
                for name, text in found["data"].items():
                    (place / name).write_text(text)
            elif mount["mountPath"] in ("/tmp", "/dev/shm") or "emptyDir" not in volume:
                continue
            places[mount["mountPath"]] = place
        return places

    def report(self, phase: str, state: Plain) -> None:
        store = self.node.store
        with store.changed:
            pod = store.get(self.key)
            if pod["metadata"]["uid"] != self.uid:
                return
            ready = "True" if phase == "Running" else "False"
            kept = [each for each in pod["status"].get("conditions", []) if each["type"] != "Ready"]
            pod["status"] |= {
                "phase": phase, "podIP": self.ip, "startTime": self.started,
                "conditions": [*kept, {"type": "Ready", "status": ready}],
                "containerStatuses": [{"name": self.name, "state": state, "ready": ready == "True", "restartCount": 0}],
            }  # fmt: skip
            store.put(self.key, pod)

    def tend(self, pod: Plain | None) -> bool:
        """False when there is nothing left to look after."""
        code = self.child.poll()
        if code is not None:
            self._ended(code)
            return False
        if pod is None or pod["metadata"]["uid"] != self.uid:  # removed by force, and its processes went on
            kill(self.child)
            return False
        if "deletionTimestamp" in pod["metadata"]:
            if self.told_at is None:
                self.told_at = time.monotonic()
                os.kill(self.child.pid, signal.SIGTERM)
            if time.monotonic() - self.told_at > pod["metadata"]["deletionGracePeriodSeconds"]:
                kill(self.child)
        return True

    def _ended(self, code: int) -> None:
        kill(self.child)  # with all that came from it, as the end of process 1 does in a pod
        number = code if code >= 0 else 128 - code
        words = self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace") if number else ""
        reason = "OOMKilled" if self.oom else "Error" if number else "Completed"
        state = {"exitCode": number, "reason": reason, "message": words, "finishedAt": now()}
        try:
            self.report("Failed" if number else "Succeeded", {"terminated": state})
        except ApiError:
            return


def kill(child: subprocess.Popen[bytes]) -> None:
    """Everything with this session, and what its members have started in others."""
    doomed = [child.pid]
    for pid in doomed:
        doomed += [other for other in _children(pid) if other not in doomed]
    for pid in reversed(doomed):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    child.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    except OSError:
        return []


class Node:
    """A node that gives a sign of life for as long as it is not `silent`. A `dead` one has lost its processes too."""

    _addresses = 1

    def __init__(self, store: Store, name: str, folder: Path, capacity: Plain) -> None:
        self.store, self.name, self.folder = store, name, folder / name
        self.silent = False
        self.seen = time.monotonic()
        self.running: dict[str, Process] = {}
        self.bad_images: dict[str, str] = {}
        self._lock = threading.Lock()
        labels = {"kubernetes.io/hostname": name}
        store.create(("nodes", "", name), {
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
            "spec": {}, "status": {"allocatable": {"pods": "50", **capacity},
                                      "conditions": [{"type": "Ready", "status": "True"}]}})  # fmt: skip

    def address(self) -> str:
        Node._addresses += 1
        return f"127.7.{Node._addresses // 250}.{2 + Node._addresses % 250}"

    def tend(self) -> None:
        if self.silent:
            return
        self.seen = time.monotonic()
        mine = [pod for pod in self.store.list("pods") if pod["spec"].get("nodeName") == self.name]
        pods = {pod["metadata"]["uid"]: pod for pod in mine}
        for uid, pod in pods.items():
            if uid not in self.running and pod["status"]["phase"] == "Pending":
                self._start(pod)
        for uid, process in list(self.running.items()):
            if not process.tend(pods.get(uid)):
                del self.running[uid]

    def _start(self, pod: Plain) -> None:
        image = pod["spec"]["containers"][0]["image"]
        key = ("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        if "deletionTimestamp" in pod["metadata"]:
            pod["status"]["phase"] = "Failed"
            self.store.put(key, pod)
        elif "bad" in image:
            waiting = {"reason": "ErrImagePull", "message": f'failed to pull image "{image}": not found'}
            pod["status"]["containerStatuses"] = [
                {"name": pod["spec"]["containers"][0]["name"], "image": image, "state": {"waiting": waiting}}
            ]
            self.store.put(key, pod)
        else:
            self.running[pod["metadata"]["uid"]] = Process(self, pod)

    def die(self) -> None:
        """The power is gone: no sign of life, and nothing runs."""
        self.silent = True
        self.stop()

    def stop(self) -> None:
        for process in self.running.values():
            kill(process.child)
        self.running = {}


def _expand(text: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: env.get(found[1], found[0]), text)


def _moved(value: str, places: dict[str, Any]) -> str:
    return next((str(place) for mounted, place in places.items() if value == mounted), value)
