"""A pod as its node knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from support.kube.node_process import Plain, Process

OVER = ("Succeeded", "Failed")


@dataclass
class Seen:
    """A pod of ours: what runs, how it has ended, and the status that the server was last told."""

    pod: Plain
    process: Process | None = None
    status: Plain = field(default_factory=dict)
    told: Plain | None = None
    again_at: float = 0.0
    """When it is tried again to start it: what it needs may not be there yet."""

    @property
    def container(self) -> Plain:
        found: Plain = self.pod["spec"]["containers"][0]
        return found

    @property
    def name(self) -> str:
        return str(self.container["name"])

    def say(self, phase: str, state: Plain | None) -> None:
        """What the server is to be told."""
        ready = "True" if phase == "Running" else "False"
        status: Plain = {"phase": phase, "conditions": [{"type": kind, "status": ready} for kind in
                                                        ("Ready", "ContainersReady")]}  # fmt: skip
        if self.process is not None:
            status |= {"podIP": self.process.ip, "podIPs": [{"ip": self.process.ip}],
                       "startTime": self.process.started, "hostIP": "127.0.0.1"}  # fmt: skip
        if state is not None:
            status["containerStatuses"] = [{"name": self.name, "image": self.container["image"], "imageID": "",
                                            "state": state, "ready": ready == "True", "restartCount": 0}]  # fmt: skip
        self.status = status
