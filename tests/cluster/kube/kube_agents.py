"""Nodes of our own for a control plane that has none, each an agent in a process of its own that can be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from node_process import kill

AGENT = Path(__file__).parent / "node_agent.py"


class Agents:
    def __init__(self, kubeconfig: str, folder: Path, names: list[str], heartbeat_s: float) -> None:
        self._running = {name: _start(kubeconfig, folder, name, heartbeat_s) for name in names}
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


def _start(kubeconfig: str, folder: Path, name: str, heartbeat_s: float) -> subprocess.Popen[str]:
    words = ["--kubeconfig", kubeconfig, "--node", name, "--folder", str(folder), "--heartbeat", str(heartbeat_s)]
    return subprocess.Popen([sys.executable, str(AGENT), *words], text=True, stdout=subprocess.PIPE)
