"""What a node's agent makes of one pod: its container with what it is told, and how that ends."""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.kube.node_container import Container, Own
from support.kube.wire import Refused

Plain = dict[str, Any]
Read = Callable[[str], Plain]
"""An object of the pod's namespace by its path, `secrets/NAME`."""
LAST_WORDS = 2048
SHM = "/dev/shm"
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}
MARK = "EVERSTEP_NODE_AGENT"
"""Stands in the environment of all that comes from a pod: `NODE/AGENT'S PID/POD'S UID`. When process 1 has ended,
nothing else tells whose children were left behind."""


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class Process:
    """Started, watched, told to end, killed after its grace or for its memory. Images are not looked at."""

    pod: Plain
    node: str
    folder: Path
    read: Read
    told_at: float | None = None
    grace_s: float = 30.0
    out_of_memory: bool = False
    started: str = field(default_factory=now)

    def __post_init__(self) -> None:
        self.log = self.folder / "log"
        self.folder.mkdir(parents=True, exist_ok=True)  # a try before may have got so far
        self.ip = address(self.pod["metadata"]["uid"])
        self.mark = f"{self.node}/{os.getpid()}/{self.pod['metadata']['uid']}"
        container = self.pod["spec"]["containers"][0]
        self.memory = _bytes(container.get("resources", {}).get("limits", {}).get("memory"))
        env, places = self._env(container), self._places(container)
        words = [_expand(word, env) for word in (*container.get("command", []), *container.get("args", []))]
        env = {key: str(places.get(value, value)) for key, value in env.items()} | {MARK: self.mark}
        self.container = Container.start(words, env, self.log, self._own(), container.get("workingDir"))

    def _own(self) -> Own:
        """As the kubelet sets it up."""
        meta, spec = self.pod["metadata"], self.pod["spec"]
        hostname = spec.get("hostname", meta["name"])[:63].rstrip("-.")
        names = [hostname]
        if "subdomain" in spec:
            names.insert(0, f"{hostname}.{spec['subdomain']}.{meta['namespace']}.svc.cluster.local")
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1\tlocalhost\n{self.ip}\t{' '.join(names)}\n")
        mounted = {each["name"] for each in spec["containers"][0].get("volumeMounts", []) if each["mountPath"] == SHM}
        sizes = [_bytes(volume.get("emptyDir", {}).get("sizeLimit")) for volume in spec.get("volumes", [])
                 if volume["name"] in mounted]  # fmt: skip
        return Own(hostname, hosts, *filter(None, sizes))

    def _env(self, container: Plain) -> dict[str, str]:
        meta = self.pod["metadata"]
        told = {"status.podIP": self.ip, "metadata.uid": meta["uid"], "spec.nodeName": self.node}
        told |= {f"metadata.annotations['{key}']": value for key, value in meta["annotations"].items()}
        env = {"PATH": os.environ["PATH"], "HOME": "/tmp"}
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                wanted = source["secretKeyRef"]
                if wanted.get("optional") and not self._has_secret(wanted["name"]):
                    continue
                env[each["name"]] = base64.b64decode(self.read(f"secrets/{wanted['name']}")["data"][wanted["key"]]
                                                     ).decode()  # fmt: skip
            else:
                env[each["name"]] = told[source["fieldRef"]["fieldPath"]] if source else each.get("value", "")
        return env

    def _has_secret(self, name: str) -> bool:
        try:
            return bool(self.read(f"secrets/{name}"))
        except Refused as error:
            if error.code != 404:
                raise
            return False

    def _places(self, container: Plain) -> dict[str, Path]:
        """Where mounted folders are instead; those of claims are where they say, so that all nodes share them."""
        volumes = {each["name"]: each for each in self.pod["spec"].get("volumes", [])}
        places = {}
        for mount in container.get("volumeMounts", []):
            volume, place = volumes[mount["name"]], self.folder / mount["name"]
            if "configMap" in volume:
                place.mkdir(exist_ok=True)
                for name, text in self.read(f"configmaps/{volume['configMap']['name']}")["data"].items():
                    (place / name).write_text(text)
            elif mount["mountPath"] in ("/tmp", SHM) or "emptyDir" not in volume:
                continue
            places[mount["mountPath"]] = place
        return places

    def end(self, grace_s: float) -> None:
        """SIGTERM once, SIGKILL after the grace; a later word may shorten it."""
        self.grace_s = grace_s
        if self.told_at is None:
            self.told_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.container.pid, signal.SIGTERM)

    def kill(self) -> None:
        kill(self.mark)
        self.container.child.wait()

    def tend(self) -> Plain | None:
        """How it has ended, as a container's state says it; None while it runs."""
        code = self.container.child.poll()
        if code is None:
            if self.told_at is not None and time.monotonic() - self.told_at > self.grace_s:
                kill(self.mark)
            elif self.memory and self.container.memory() > self.memory:
                self.out_of_memory = True
                kill(self.mark)
            return None
        kill(self.mark)  # with all that came from it, as the end of process 1 does in a pod
        number = code if code >= 0 else 128 - code
        words = self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace") if number else ""
        reason = "OOMKilled" if self.out_of_memory else "Error" if number else "Completed"
        return {"terminated": {"exitCode": number, "reason": reason, "message": words, "startedAt": self.started,
                               "finishedAt": now()}}  # fmt: skip


def address(uid: str) -> str:
    """An address of its own for each pod, without anybody who gives them out."""
    first, second, third = (int(uid[place : place + 2], 16) for place in (0, 2, 4))
    return f"127.{first}.{second}.{2 + third % 250}"


def kill(mark: str) -> None:
    """All that has this mark, or begins with it; until nothing is left that could have started more."""
    while found := marked(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    wanted, found = f"\0{MARK}={mark}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in b"\0" + file.read_bytes():
                found.append(int(file.parent.name))
    return found


def _bytes(text: str | None) -> int:
    unit = next((unit for unit in UNITS if (text or "").endswith(unit)), "")
    return int(float((text or "0").removesuffix(unit)) * UNITS.get(unit, 1))


def _expand(text: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: env.get(found[1], found[0]), text)
