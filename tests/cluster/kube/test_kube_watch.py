"""Whoever follows a job is told what changes: the watch as a server speaks it, and what becomes of a broken one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx2
import pytest

from everstep.errors import ConfigError
from everstep.launch.config import job_config
from everstep.launch.schedulers.base import Ask, Program
from everstep.launch.schedulers.job import JobHandle, JobState
from everstep.launch.schedulers.kubernetes.client import Client
from everstep.launch.schedulers.kubernetes.informer import Informer
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support.kube.cluster import Cluster
from support.kube.object_store import Plain
from support.processes import until

pytestmark = pytest.mark.cluster
OURS = {"app.kubernetes.io/managed-by": "everstep"}


@pytest.fixture
def mirror(cluster: Cluster) -> Iterator[Informer]:
    made = Informer(Client(None, None, retry_s=20), "ConfigMap", OURS)
    until(lambda: cluster.server.watches == 1)
    yield made
    made.close()


def settings(cluster: Cluster, name: str, labels: dict[str, str] | None = None, **data: str) -> None:
    """A ConfigMap: one that is there is changed."""
    key = ("configmaps", "default", name)
    thing = {"apiVersion": "v1", "kind": "ConfigMap", "data": data,
             "metadata": {"name": name, "labels": OURS if labels is None else labels}}  # fmt: skip
    with cluster.store.changed:
        if any(each["metadata"]["name"] == name for each in cluster.store.list("configmaps")):
            cluster.store.put(key, {**cluster.store.get(key), "data": data})
        else:
            cluster.server.create(key, thing)


def known(mirror: Informer) -> dict[str, dict[str, str]]:
    return {each["metadata"]["name"]: each["data"] for each in mirror.things()}


def listed(cluster: Cluster) -> int:
    """How often all was asked for; a watch has no number of its own among the requests."""
    return cluster.server.requests.count("GET /api/v1/namespaces/default/configmaps") - cluster.server.watches


# As the API server speaks it


def events(cluster: Cluster, version: int, until_: Callable[[list[Plain]], bool], **query: str) -> list[Plain]:
    """What a watch says, as long as it takes."""
    url = f"{cluster.server.url}/api/v1/namespaces/default/configmaps"
    told: list[Plain] = []
    with httpx2.stream("GET", url, params={"watch": "1", "resourceVersion": str(version), **query},
                       timeout=20, trust_env=False) as response:  # fmt: skip
        assert response.status_code == 200
        for line in response.iter_lines():
            told.append(json.loads(line))
            if until_(told):
                break
    return told


def test_a_watch_tells_all_that_came_after_a_version(cluster: Cluster) -> None:
    settings(cluster, "a")
    before = cluster.store.version
    settings(cluster, "b")
    settings(cluster, "a", x="1")
    cluster.server.delete(("configmaps", "default", "b"), {}, {})
    told = events(cluster, before, lambda told: len(told) == 3)
    assert [(each["type"], each["object"]["metadata"]["name"]) for each in told] == [
        ("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]  # fmt: skip


def test_a_watch_tells_only_of_what_it_asked_for(cluster: Cluster) -> None:
    before = cluster.store.version
    settings(cluster, "theirs", {"app": "other"})
    settings(cluster, "ours")
    told = events(cluster, before, lambda told: len(told) == 1, labelSelector="app.kubernetes.io/managed-by=everstep")
    assert told[0]["object"]["metadata"]["name"] == "ours"


def test_a_version_that_is_forgotten_is_said_in_the_watch_itself(cluster: Cluster) -> None:
    before = cluster.store.version
    settings(cluster, "a")
    cluster.store.forget()
    (told,) = events(cluster, before, lambda told: False)
    assert (told["type"], told["object"]["code"], told["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_a_bookmark_is_a_version_and_nothing_else(cluster: Cluster) -> None:
    before = cluster.store.version
    settings(cluster, "theirs", {"app": "other"})
    (told,) = events(cluster, before, lambda told: len(told) == 1, allowWatchBookmarks="true",
                     labelSelector="app.kubernetes.io/managed-by=everstep")  # fmt: skip
    assert told["type"] == "BOOKMARK"
    assert int(told["object"]["metadata"]["resourceVersion"]) > before


# What becomes of it


def test_a_mirror_lists_once_and_is_told_the_rest(cluster: Cluster, mirror: Informer) -> None:
    settings(cluster, "a", x="1")
    settings(cluster, "b")
    settings(cluster, "a", x="2")
    cluster.server.delete(("configmaps", "default", "b"), {}, {})
    until(lambda: known(mirror) == {"a": {"x": "2"}})
    assert (listed(cluster), cluster.server.watches) == (1, 1)


def test_a_watch_that_is_cut_goes_on_from_the_last_version_and_lists_nothing(
    cluster: Cluster, mirror: Informer
) -> None:
    settings(cluster, "a", x="1")
    until(lambda: known(mirror) == {"a": {"x": "1"}})
    with cluster.store.changed:
        cluster.server.cuts += 1
        settings(cluster, "a", x="2")
        settings(cluster, "b")
    until(lambda: known(mirror) == {"a": {"x": "2"}, "b": {}})
    until(lambda: cluster.server.watches == 2)
    assert (listed(cluster), cluster.server.gone) == (1, 0)


def test_a_watch_whose_history_is_gone_lists_anew_and_forgets_what_has_gone(cluster: Cluster, mirror: Informer) -> None:
    for name in ("a", "b"):
        settings(cluster, name)
    until(lambda: set(known(mirror)) == {"a", "b"})
    with cluster.away():
        cluster.store.remove(("configmaps", "default", "a"))
        settings(cluster, "b", x="3")
        cluster.store.forget()
    until(lambda: known(mirror) == {"b": {"x": "3"}})
    assert (listed(cluster), cluster.server.gone) == (2, 1)
    settings(cluster, "c")
    until(lambda: "c" in known(mirror))


def test_after_a_bookmark_a_history_that_is_gone_is_not_missed(cluster: Cluster, mirror: Informer) -> None:
    for number in range(3):
        settings(cluster, f"theirs-{number}", {"app": "other"})
    newest = cluster.store.version
    until(lambda: int(mirror._version or 0) >= newest)
    cluster.store.forget(newest)  # and not what nodes have said since
    cluster.server.cuts += 1
    settings(cluster, "a")
    until(lambda: set(known(mirror)) == {"a"})
    assert (listed(cluster), cluster.server.gone) == (1, 0)


def test_a_server_that_stays_away_is_said_and_one_that_comes_back_is_heard(cluster: Cluster) -> None:
    mirror = Informer(Client(None, None, retry_s=0.3), "ConfigMap", OURS)

    def is_lost() -> bool:
        try:
            return mirror.things() is None
        except ConfigError as error:
            return "nothing has been heard of the API server for" in str(error)

    with cluster.away():
        until(is_lost)
    settings(cluster, "a")
    until(lambda: not is_lost() and set(known(mirror)) == {"a"})
    mirror.close()


def test_who_may_not_watch_lists_instead(cluster: Cluster) -> None:
    cluster.server.rights.denied.add(("", "configmaps", "watch"))
    mirror = Informer(Client(None, None, retry_s=20), "ConfigMap", OURS)
    settings(cluster, "a")
    until(lambda: set(known(mirror)) == {"a"})
    assert cluster.server.watches == 0
    mirror.close()


# A job that is followed


@pytest.fixture
def followed(cluster: Cluster) -> Iterator[tuple[Cluster, Ask, JobHandle]]:
    """A job that waits for a place for ever."""
    job = job_config({"scheduler": "k8s", "nodes": 2, "nproc": 1, "gpus": 8, "image": "i"})
    scheduler = Kubernetes(job, retry_s=20)
    handle = scheduler.submit(
        scheduler.render(job, Program("demo", "s3://runs/demo", ("-m", "everstep.trainer"), "token-1"))
    )
    with scheduler.follow() as ask:
        yield cluster, ask, handle


def test_a_job_that_is_followed_is_asked_for_once(followed: tuple[Cluster, Ask, JobHandle]) -> None:
    cluster, ask, handle = followed
    del cluster.server.requests[:]
    until(lambda: "Insufficient nvidia.com/gpu" in ask([handle])[handle].reason)
    until(lambda: cluster.server.watches == 2)
    for _ in range(50):
        assert ask([handle])[handle].state is JobState.pending
    assert len(cluster.server.requests) == 4  # of jobs and of pods a list and a watch


def test_a_job_that_the_watch_has_not_told_of_yet_is_asked_for(followed: tuple[Cluster, Ask, JobHandle]) -> None:
    cluster, ask, handle = followed
    ask([handle])
    with cluster.away():  # the watch is cut, and will find the new job late
        pass
    made = cluster.store.get(("jobs", "default", handle.id.rsplit("/", 1)[-1]))
    second = {**made, "metadata": {**made["metadata"], "name": "demo-2"}}
    cluster.server.create(("jobs", "default", "demo-2"), second)
    other = JobHandle("k8s", "current", "default/job/demo-2")
    assert ask([other])[other].state is JobState.pending
