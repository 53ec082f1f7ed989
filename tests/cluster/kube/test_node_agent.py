"""A node's agent in a process of its own, before a server that speaks TLS and wants a certificate, as real ones do."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import ssl
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.launch.schedulers.kubernetes.client import Client
from support.kube.cluster import Cluster
from support.kube.node_agents import Agents, certificate
from support.kube.node_container import why_plain
from support.kube.object_store import Plain
from support.kube.proxy import Between
from support.processes import until

pytestmark = [pytest.mark.cluster, pytest.mark.process]
SCALE = 0.05
WAIT = "trap 'exit 143' TERM; while :; do sleep 0.05; done"
WAIT_FOR_EVER = "while :; do sleep 0.05; done"
NAMESPACES = pytest.mark.skipif(why_plain() is not None, reason=f"containers are plain processes: {why_plain()}")
HUNGRY = """import time; food = b"x" * (96 * 2**20); time.sleep(300)"""


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


def pod(cluster: Cluster, name: str, node: str, of: Plain | None = None, **container: Any) -> None:
    """Without a job: whoever binds it, the node runs it. `of` is what its spec has besides."""
    container = {"name": "c", "image": "i", **container}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 2, **(of or {})}
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
    name = str(tmp_path / "child")
    pod(secure, "lost", "a", command=["sh", "-c", f"setsid sh -c '{WAIT_FOR_EVER}' {name} & {WAIT}"])
    until(lambda: phase(secure, "lost") == "Running" and called(name) != [])
    agents.die("a")
    until(lambda: called(name) == [])
    until(lambda: ready(secure, "a") == "Unknown")
    assert phase(secure, "lost") == "Running"
    assert ready(secure, "b") == "True"


def ready(cluster: Cluster, node: str) -> str:
    conditions = cluster.store.get(("nodes", "", node))["status"]["conditions"]
    return str(next(each["status"] for each in conditions if each["type"] == "Ready"))


def called(name: str) -> list[int]:
    """Processes that have this word on their command line, in whatever namespace they are."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def said(cluster: Cluster, name: str) -> list[str]:
    """What a pod has printed, once it has ended well."""
    until(lambda: phase(cluster, name) in ("Succeeded", "Failed"))
    printed = cluster.server._log(("pods", "default", name))
    assert phase(cluster, name) == "Succeeded", printed
    return printed.splitlines()


def python(text: str, *words: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text), *words]


@NAMESPACES
def test_the_main_process_is_number_1_and_sees_only_its_own(secure: Cluster, agents: Agents) -> None:
    pod(secure, "first", "a", command=python("""
        import os
        print(os.getpid(), os.getppid(), os.getsid(0), [each for each in os.listdir("/proc") if each.isdigit()])
    """))  # fmt: skip
    assert said(secure, "first") == ["1 0 1 ['1']"]


@NAMESPACES
@pytest.mark.parametrize(("of", "hostname", "known"), [
    ({}, "named", "named"),
    ({"hostname": "job-0", "subdomain": "job"}, "job-0", "job-0.job.default.svc.cluster.local"),
])  # fmt: skip
def test_a_pod_has_a_hostname_and_finds_its_address_by_it(
    secure: Cluster, agents: Agents, of: Plain, hostname: str, known: str
) -> None:
    ip = [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    pod(secure, "named", "a", of, env=ip, command=python("""
        import os, socket
        name = socket.gethostname()
        print(name, socket.getfqdn(), socket.gethostbyname(name) == os.environ["IP"], socket.gethostbyname("localhost"))
    """))  # fmt: skip
    assert said(secure, "named") == [f"{hostname} {known} True 127.0.0.1"]


@NAMESPACES
def test_shared_memory_is_the_pods_own_and_as_large_as_its_volume(secure: Cluster, agents: Agents) -> None:
    volumes = {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    shell = "ls -A /dev/shm; stat -f -c '%b %S' /dev/shm; ipcs -m | grep -c 0x"
    pod(secure, "small", "a", volumes, volumeMounts=mounts, command=["sh", "-c", f"{shell}; :"])
    pod(secure, "usual", "a", command=["sh", "-c", f"{shell}; :"])
    assert said(secure, "small") == ["256 4096", "0"]
    assert said(secure, "usual") == ["16384 4096", "0"]


@NAMESPACES
def test_sigterm_reaches_the_main_process_and_has_no_action_by_default(
    secure: Cluster, agents: Agents, tmp_path: Path
) -> None:
    """`sleep` has no handler: as process 1 it goes on until its grace is over."""
    heard, deaf = tmp_path / "heard", ["sleep", "301.25"]
    trap = f"trap 'echo $$ > {heard}; exit 0' TERM; echo ready; {WAIT_FOR_EVER}"
    pod(secure, "hears", "a", command=["sh", "-c", trap])
    pod(secure, "deaf", "a", {"terminationGracePeriodSeconds": 300}, command=deaf)
    until(lambda: phase(secure, "deaf") == phase(secure, "hears") == "Running")
    until(lambda: secure.server._log(("pods", "default", "hears")) == "ready\n")
    for name in ("deaf", "hears"):
        secure.server.delete(("pods", "default", name), {}, {})
    until(lambda: [each["metadata"]["name"] for each in secure.store.list("pods")] == ["deaf"])
    assert heard.read_text() == "1\n"
    until(lambda: len([each for each in secure.store.list("events") if each["reason"] == "Killing"]) == 2)
    assert phase(secure, "deaf") == "Running"
    secure.server.delete(("pods", "default", "deaf"), {"gracePeriodSeconds": 0}, {})
    until(lambda: called(deaf[1]) == [])


@NAMESPACES
@pytest.mark.parametrize("end", ["exits", "is removed", "is killed"])
def test_all_that_a_container_has_started_ends_with_its_main_process(
    secure: Cluster, agents: Agents, tmp_path: Path, end: str
) -> None:
    """Also what has a session of its own and nothing in its environment."""
    main, child, word = str(tmp_path / "main"), str(tmp_path / "child"), tmp_path / "word"
    start = f"setsid env -i sh -c '{WAIT_FOR_EVER}' {child} & while [ ! -e {word} ]; do sleep 0.05; done"
    pod(secure, "parent", "a", command=["sh", "-c", start, main])
    until(lambda: phase(secure, "parent") == "Running" and called(child) != [])
    if end == "exits":
        word.touch()
    elif end == "is removed":
        secure.server.delete(("pods", "default", "parent"), {"gracePeriodSeconds": 0}, {})
    else:
        programs = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in called(main)}
        # The other one is unshare(1); by its number it cannot be told, since numbers begin anew at 32768.
        (process,) = [pid for pid, program in programs.items() if not program.endswith(b"unshare")]
        os.kill(process, signal.SIGKILL)
    until(lambda: called(child) == [])


@NAMESPACES
def test_who_has_lost_its_parent_is_charged_to_the_pod(secure: Cluster, agents: Agents) -> None:
    limited = {"limits": {"memory": "64Mi"}}
    orphan = f"(setsid env -i {sys.executable} -c '{HUNGRY}' &)"
    pod(secure, "hungry", "a", resources=limited, command=["sh", "-c", f"{orphan}; {WAIT_FOR_EVER}"])
    until(lambda: phase(secure, "hungry") == "Failed")
    assert {"exitCode": 137, "reason": "OOMKilled"}.items() <= state(secure, "hungry")["terminated"].items()
    until(lambda: called(HUNGRY) == [])


@NAMESPACES
def test_what_is_kept_in_shared_memory_is_charged_to_the_pod(secure: Cluster, agents: Agents) -> None:
    volumes = {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]}
    fill = f"head -c 96M /dev/zero > /dev/shm/food; {WAIT_FOR_EVER}"
    pod(secure, "stores", "a", volumes, resources={"limits": {"memory": "64Mi"}}, command=["sh", "-c", fill],
        volumeMounts=[{"name": "shm", "mountPath": "/dev/shm"}])  # fmt: skip
    until(lambda: phase(secure, "stores") == "Failed")
    assert state(secure, "stores")["terminated"]["reason"] == "OOMKilled"


SUPERVISE = """
    import os, sys
    from everstep.launch.job_start.local_start import Local
    from everstep.launch.job_start.signals import Signals
    with Signals() as signals:
        sys.exit(Local(signals, lambda reason: None, 10).run(sys.argv[1:], os.environ))
"""
ORPHANS = """
    import os, pathlib, subprocess, sys, time
    for _ in range(5):
        subprocess.run(["sh", "-c", "setsid sh -c 'read word' < /dev/null &"], check=True)
    deadline = time.monotonic() + 10
    while len(left := [each for each in pathlib.Path("/proc").glob("[0-9]*")]) > 2:
        if time.monotonic() > deadline:
            sys.exit("\\n".join((each / "stat").read_text() for each in left))
        time.sleep(0.05)
"""


@NAMESPACES
def test_the_supervisor_as_process_1_buries_orphans_while_it_runs(secure: Cluster, agents: Agents) -> None:
    paths = [{"name": "PYTHONPATH", "value": str(Path(__file__).parents[3])}]
    pod(secure, "parent", "a", env=paths, command=python(SUPERVISE, *python(ORPHANS)))
    assert said(secure, "parent") == []


@pytest.mark.skipif(
    shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root, from whom a right can be taken"
)
def test_without_the_right_to_make_namespaces_containers_are_plain_processes_and_it_is_said(
    secure: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Agents(str(secure.kubeconfig), tmp_path / "nodes", ["p"], 0.5, ["setpriv", "--bounding-set", "-sys_admin"])
    pod(secure, "plain", "p", command=python("import os; print(os.getpid() == 1)"))
    assert said(secure, "plain") == ["False"]
    made.stop()
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("node p: ")]
    assert told == ["node p: containers are plain processes: unshare: unshare failed: Operation not permitted"]
