"""Nodes of our own for a control plane that has none, each an agent in a process of its own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support import PATHS
from support.kube.node_process import kill
from support.kube.wire import Wire

CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=everstep-test "
    "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
)
AGENT = [sys.executable, "-m", "support.kube.node_agent"]


class Agents:
    """`under`: a command that starts each agent, and takes something from it. `popen`: of agents and pods; the one of
    `support.warm` forks them."""

    def __init__(
        self, kubeconfig: str, folder: Path, names: list[str], heartbeat_s: float, under: Sequence[str] = (),
        popen: type[subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:  # fmt: skip
        words = ["--kubeconfig", kubeconfig, "--folder", str(folder), "--heartbeat", str(heartbeat_s)]
        if Wire(Path(kubeconfig)).tls is not None:
            # A server that speaks TLS asks for logs in the same way; whose certificate it is it does not look at.
            words += ["--certificate", *certificate(folder)]
        self._running = {name: _start(name, [*under, *AGENT, *words], popen) for name in names}
        for child in self._running.values():
            assert child.stdout is not None
            assert child.stdout.readline(), "an agent has not come up"

    def __contains__(self, node: str) -> bool:
        return node in self._running

    def die(self, node: str) -> None:
        """Without a word: kill -9, of the agent and of all that its pods have started."""
        child = self._running.pop(node)
        child.kill()
        child.wait()
        kill(f"{node}/{child.pid}/")

    def stop(self) -> None:
        for child in self._running.values():
            child.terminate()
        for child in self._running.values():
            assert child.wait(30) == 0


def certificate(folder: Path) -> tuple[str, str]:
    """Files of a new certificate, signed by itself, and of its key."""
    folder.mkdir(exist_ok=True)
    subprocess.run(CERTIFICATE.split(), check=True, cwd=folder, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def _start(name: str, words: list[str], popen: type[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    return popen([*words, "--node", name], env={**os.environ, "PYTHONPATH": PATHS}, text=True, stdout=subprocess.PIPE)
