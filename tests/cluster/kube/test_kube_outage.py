"""A launcher that is cut off from any API server, by a proxy between the two: pods are a shell, and go on meanwhile."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.launch.schedulers.base import Ask
from everstep.launch.schedulers.job import JobHandle, JobState
from everstep.launch.schedulers.kubernetes.scheduler import Kubernetes
from support.kube.place import Place, place
from support.kube.proxy import Between

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
OUTAGE_S = 30.0
"""On whatever cluster: how long it is waited for is the launcher's matter, and not scaled."""
ENDS = "trap 'exit 143' TERM; for i in $(seq 40); do sleep 0.1; done"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("outage")) as made:
        yield made


@pytest.fixture
def between(there: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    made = Between(Path(there.kubeconfig), tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
    yield made
    made.close()


def state(ask: Ask, handle: JobHandle) -> JobState:
    return ask([handle])[handle].state


def test_a_server_that_is_away_for_30_s_is_waited_for_and_its_job_ends_meanwhile(
    there: Place, between: Between, tmp_path: Path
) -> None:
    job = there.config(tmp_path, ENDS)
    scheduler, made = Kubernetes(job), list[JobHandle]()
    handle = scheduler.submit(there.rendered(job, "ends"))
    with scheduler.follow() as ask:
        there.until(lambda: state(ask, handle) is JobState.running)
        with between.away():
            back = time.monotonic() + OUTAGE_S
            thread = threading.Thread(target=lambda: made.append(Kubernetes(job).submit(there.rendered(job, "late"))))
            thread.start()
            there.until(lambda: time.monotonic() > back)
            assert made == []
        thread.join(60)
        there.until(lambda: state(ask, handle) is JobState.succeeded)
        there.until(lambda: state(ask, made[0]) is JobState.succeeded)
    assert [each["metadata"]["name"] for each in there.jobs()].count(made[0].id.rsplit("/", 1)[-1]) == 1
    scheduler.cancel([handle, *made])


def test_a_watch_that_is_cut_again_and_again_hears_of_the_end(there: Place, between: Between, tmp_path: Path) -> None:
    job = there.config(tmp_path, ENDS, nodes=1)
    scheduler, seen = Kubernetes(job), list[JobState]()
    handle = scheduler.submit(there.rendered(job, "cut"))

    def ended() -> bool:
        between.cut()
        seen.append(state(ask, handle))
        return seen[-1].is_over

    with scheduler.follow() as ask:
        there.until(ended)
    # Pauses between two tries grow, so what is soon over may never be heard of; but nothing in the wrong order.
    order = [JobState.pending, JobState.running, JobState.succeeded]
    assert [one for one, _ in itertools.groupby(seen)] == [one for one in order if one in seen]
    assert seen[-1] is JobState.succeeded
    scheduler.cancel([handle])


def test_a_launcher_that_comes_back_to_a_history_that_is_gone_knows_how_all_stands(
    there: Place, between: Between, tmp_path: Path
) -> None:
    if why := there.why_nothing_is_forgotten():
        pytest.skip(why)
    # They end when the watch is cut, and not before: what it has heard already is no history that it lacks.
    word = tmp_path / "end"
    job = there.config(tmp_path, f"trap 'exit 143' TERM; while [ ! -e {word} ]; do sleep 0.05; done")
    scheduler = Kubernetes(job)
    handle = scheduler.submit(there.rendered(job, "forgotten"))
    with scheduler.follow() as ask:
        there.until(lambda: state(ask, handle) is JobState.running)
        before = there.forgets()
        with between.away():
            word.touch()
            there.until(lambda: "active" not in there.job(handle.id.rsplit("/", 1)[-1])["status"])
            there.forget()
        there.until(lambda: state(ask, handle) is JobState.succeeded)
        if before is not None:
            # The watch of jobs, and that of pods, which may come back later: the job's end is known without it.
            there.until(lambda: there.forgets() == before + 2)
    scheduler.cancel([handle])
