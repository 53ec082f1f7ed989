"""A node's agent in a process of its own, before a server that speaks TLS and wants a certificate, as real ones do."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_agents import Agents
from kube_cluster import Cluster
from kube_proxy import Between
from kube_store import Plain
from process_helpers import alive, until

from launch.schedulers.kubernetes.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.process]
SCALE = 0.05
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"
CERTIFICATE = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=everstep-test \
  -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem
"""


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Cluster]:
    """One certificate is everybody's: of the server, of its authority, and of who speaks to it."""
    subprocess.run(CERTIFICATE, shell=True, check=True, cwd=tmp_path, capture_output=True)
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    with Cluster.up(tmp_path, 0, SCALE, certificate=files) as made:
        yield made
    assert made.errors == []


@pytest.fixture
def agents(secure: Cluster, tmp_path: Path) -> Iterator[Agents]:
    made = Agents(str(secure.kubeconfig), tmp_path / "nodes", ["a", "b"], 0.5)
    yield made
    made.stop()


def pod(cluster: Cluster, name: str, node: str, shell: str = WAIT) -> None:
    """Without a job: whoever binds it, the node runs it."""
    container = {"name": "c", "image": "i", "command": ["sh", "-c", shell]}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 2}
    meta = {"name": name, "annotations": {}}
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": {"phase": "Pending"}}
    cluster.server.create(("pods", "default", name), made)


def phase(cluster: Cluster, name: str) -> str:
    return str(cluster.store.get(("pods", "default", name))["status"]["phase"])


def test_who_shows_no_certificate_is_not_answered(secure: Cluster) -> None:
    stranger = ssl.create_default_context(cafile=str(secure.folder / "cert.pem"))
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as it falls
        ask(secure, stranger)
    stranger.load_cert_chain(secure.folder / "cert.pem", secure.folder / "key.pem")
    assert b"gitVersion" in ask(secure, stranger)


def ask(cluster: Cluster, context: ssl.SSLContext) -> bytes:
    with urllib.request.urlopen(f"{cluster.server.url}/version", context=context, timeout=10) as answer:
        return bytes(answer.read())


def test_pods_run_and_end_on_their_nodes(secure: Cluster, agents: Agents) -> None:
    pod(secure, "well", "a", "echo done")
    pod(secure, "badly", "b", "echo why >&2; exit 3")
    until(lambda: (phase(secure, "well"), phase(secure, "badly")) == ("Succeeded", "Failed"))
    (container,) = secure.store.get(("pods", "default", "badly"))["status"]["containerStatuses"]
    ended: Plain = container["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (3, "Error", "why\n")


def test_a_launcher_behind_the_proxy_needs_no_certificate(
    secure: Cluster, agents: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way its kubeconfig says: files, or the certificates themselves."""
    inline(secure.kubeconfig)
    between = Between(secure.kubeconfig, tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(between.kubeconfig))
    assert len(Client(None, None).items("/api/v1/nodes")) == 2
    between.close()


def inline(kubeconfig: Path) -> None:
    config = json.loads(kubeconfig.read_text())
    for part in (config["clusters"][0]["cluster"], config["users"][0]["user"]):
        for key in [key for key in part if key not in ("server", "token")]:
            part[f"{key}-data"] = base64.b64encode(Path(part.pop(key)).read_bytes()).decode()
    kubeconfig.write_text(json.dumps(config))


def test_a_node_that_is_killed_leaves_nothing_and_says_nothing(secure: Cluster, agents: Agents, tmp_path: Path) -> None:
    pod(secure, "lost", "a", f"setsid sh -c 'echo $$ > {tmp_path}/child; exec sleep 300' & {WAIT}")
    until(lambda: phase(secure, "lost") == "Running" and (tmp_path / "child").exists())
    until(lambda: bool((tmp_path / "child").read_text()))
    agents.die("a")
    assert not alive(int((tmp_path / "child").read_text()))
    until(lambda: ready(secure, "a") == "Unknown")
    assert phase(secure, "lost") == "Running"
    assert ready(secure, "b") == "True"


def ready(cluster: Cluster, node: str) -> str:
    conditions = cluster.store.get(("nodes", "", node))["status"]["conditions"]
    return str(next(each["status"] for each in conditions if each["type"] == "Ready"))
