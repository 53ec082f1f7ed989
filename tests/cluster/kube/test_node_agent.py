"""A node's agent in a process of its own, before a server that speaks TLS and wants a certificate, as real ones do."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_agents import Agents, certificate
from kube_cluster import Cluster
from kube_proxy import Between
from kube_store import Plain
from process_helpers import alive, until

from launch.schedulers.kubernetes.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.process]
SCALE = 0.05
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Cluster]:
    """One certificate is everybody's: of the server, of its authority, and of who speaks to it."""
    with Cluster.up(tmp_path, 0, SCALE, certificate=certificate(tmp_path)) as made:
        yield made
    assert made.errors == []


@pytest.fixture
def agents(secure: Cluster, tmp_path: Path) -> Iterator[Agents]:
    made = Agents(str(secure.kubeconfig), tmp_path / "nodes", ["a", "b"], 0.5)
    yield made
    made.stop()


def pod(cluster: Cluster, name: str, node: str, **container: object) -> None:
    """Without a job: whoever binds it, the node runs it."""
    container = {"name": "c", "image": "i", **container}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 2}
    meta = {"name": name, "annotations": {}}
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": {"phase": "Pending"}}
    cluster.server.create(("pods", "default", name), made)


def phase(cluster: Cluster, name: str) -> str:
    return str(cluster.store.get(("pods", "default", name))["status"]["phase"])


def state(cluster: Cluster, name: str) -> Plain:
    """Of its container; nothing before the node has said any."""
    found = cluster.store.get(("pods", "default", name))["status"].get("containerStatuses", [])
    return dict(found[0]["state"]) if found else {}


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
    pod(secure, "well", "a", command=["echo", "done"])
    pod(secure, "badly", "b", command=["sh", "-c", "echo why >&2; exit 3"])
    until(lambda: (phase(secure, "well"), phase(secure, "badly")) == ("Succeeded", "Failed"))
    ended = state(secure, "badly")["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (3, "Error", "why\n")
    assert secure.server._log(("pods", "default", "badly")) == "why\n"


def test_a_program_that_is_not_there_has_failed_to_start(secure: Cluster, agents: Agents) -> None:
    pod(secure, "nothing", "a", command=["no-such-program"])
    until(lambda: phase(secure, "nothing") == "Failed")
    ended = state(secure, "nothing")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert 'exec: "no-such-program"' in ended["message"]


def test_a_secret_that_is_not_there_yet_is_waited_for(secure: Cluster, agents: Agents) -> None:
    wanted = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}}]
    pod(secure, "early", "a", command=["sh", "-c", "echo $KEY"], env=wanted)
    until(lambda: state(secure, "early").get("waiting", {}).get("reason") == "CreateContainerConfigError")
    assert phase(secure, "early") == "Pending"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "data": {"k": "bGF0ZQ=="}}
    secure.server.create(("secrets", "default", "keys"), secret)
    until(lambda: phase(secure, "early") == "Succeeded")


def test_a_pod_that_is_told_to_go_is_given_its_grace_and_then_is_gone(secure: Cluster, agents: Agents) -> None:
    pod(secure, "goes", "a", command=["sh", "-c", WAIT])
    pod(secure, "stays", "b", command=["sh", "-c", WAIT.replace("exit 143", ":")])
    until(lambda: phase(secure, "goes") == phase(secure, "stays") == "Running")
    for name in ("goes", "stays"):
        secure.server.delete(("pods", "default", name), {}, {})
    until(lambda: secure.store.list("pods") == [])
    ended = [event["message"] for event in secure.store.list("events") if event["reason"] == "Killing"]
    assert ended == ["Stopping container c"] * 2


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
    child = f"setsid sh -c 'echo $$ > {tmp_path}/child; exec sleep 300' &"
    pod(secure, "lost", "a", command=["sh", "-c", f"{child} {WAIT}"])
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
