"""Three pods train the toy, and lose one after the other: the same samples, the same parameters, nobody asked.

One run suffers all faults, one after the other: to start three processes costs far more than all that they train. All
of it goes through an API server, so it runs on any cluster whose pods see the folder of runs (k8s/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from everstep.launch.job_start.start_record import Start
from everstep.launch.schedulers.kubernetes.job_status import IGNORED
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import ledger_toy, warm
from support.kube.place import Place, place
from support.kube.proxy import Between
from support.kube.runs import Run

pytestmark = [pytest.mark.process, pytest.mark.cluster, pytest.mark.timeout(1800)]
STEPS, PODS, NODES = 70, 3, 5
TRAINING = (f"steps={STEPS}", "checkpoint.every=4", "data.pause_s=0.1", "parallel=ddp", f"job.nodes={PODS}")
DEATH = "a node that dies without a word"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("faults"), NODES, warm.Popen) as made:
        if made.root is None:
            pytest.skip("RUN_ROOT is no folder: these tests read what pods have noted in one that both see")
        made.root.mkdir(exist_ok=True)
        yield made


@dataclass
class Story:
    """A run, and what each fault cost it."""

    run: Run
    replaced: dict[str, set[int]] = field(default_factory=dict)
    """Indexes that have another pod after the fault."""
    starts: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    """Failures that Kubernetes counts against the job, before the one that is the job's own."""
    followed: tuple[int | None, list[str]] = (None, [])

    def suffer(self, name: str, step: int, fault: Callable[[], None]) -> None:
        """At a step. Afterwards all train again."""
        run = self.run
        run.wait_for_step(step)
        before, start = self._pods(), Start.numbers(run.folder)[-1]
        fault()
        for rank in range(PODS):
            began = f"start-{start + 1:04d}-rank-{rank}-"
            run.until(lambda began=began: ledger_toy.last_step(run.ledger, began) > 0, f"{began} after {name}")  # type: ignore[misc]
        after = self._pods()
        self.replaced[name] = {index for index in range(PODS) if before[index] != after[index]}
        self.starts[name] = Start.numbers(run.folder)[-1] - start

    def _pods(self) -> list[str]:
        return [self.run.pod(index)["metadata"]["uid"] for index in range(PODS)]


@pytest.fixture(scope="module")
def story(there: Place) -> Iterator[Story]:
    """The launcher that follows it goes by a way of its own, which is cut while memory runs out."""
    assert there.root is not None
    between = Between(Path(there.kubeconfig), there.root)
    run = Run(there, there.root, f"disturbed-{there.namespace[-8:]}", str(between.kubeconfig))
    told = Story(run)
    run.submit(*TRAINING, "job.mem=2G", "job.k8s.shm_gb=1")
    follower = run.start("status", run.name, "-f", "--root", str(there.root))
    told.suffer("an eviction of the pod that decides", 6, lambda: evict(run, 0))
    told.suffer("two evictions at once", 14, lambda: evict(run, 0, 2))
    if not there.why_no_node_dies():
        told.suffer(DEATH, 22, lambda: there.kill_node(run.pod(2)["spec"]["nodeName"]))
    told.suffer("a node that is drained", 30, lambda: there.drain(run.pod(1)["spec"]["nodeName"]))
    told.counted = run.job["status"].get("failed", 0)
    with between.away():
        told.suffer("a container that is killed for its memory", 38, lambda: lose_memory(run, 1))
    between.cut()
    run.wait()
    told.followed = (follower.wait(60), follower.communicate()[0].splitlines())
    yield told
    between.close()


def evict(run: Run, *indexes: int) -> None:
    for pod in [run.pod(index) for index in indexes]:
        run.place.evict(pod)


def lose_memory(run: Run, index: int) -> None:
    """The trainer in this pod finds a note, and takes more than it may have."""
    (run.ledger / f"hungry-{run.pod(index)['metadata']['uid']}").touch()


@pytest.mark.parametrize(("fault", "indexes"), [
    ("an eviction of the pod that decides", {0}),
    ("two evictions at once", {0, 2}),
    (DEATH, {2}),
    ("a node that is drained", {1}),
    ("a container that is killed for its memory", {1}),
])  # fmt: skip
def test_a_fault_costs_one_start_and_only_the_pods_that_are_lost(
    there: Place, story: Story, fault: str, indexes: set[int]
) -> None:
    if fault == DEATH and (why := there.why_no_node_dies()):
        pytest.skip(why)
    assert story.replaced[fault] == indexes
    assert story.starts[fault] == 1


def test_no_budget_is_burnt_by_what_befalls_pods_from_outside(story: Story) -> None:
    assert story.counted == 0


def test_the_kill_for_memory_is_what_kubernetes_calls_it(there: Place, story: Story) -> None:
    ended = [each["state"].get("terminated", {}).get("reason") for pod in there.pods()
             for each in pod["status"].get("containerStatuses", [])]  # fmt: skip
    assert "OOMKilled" in ended


def test_who_follows_by_a_way_that_is_cut_hears_of_the_end(story: Story) -> None:
    code, lines = story.followed
    assert (code, lines[-1].split()[0]) == (0, "done"), lines


def test_samples_and_parameters_are_those_of_a_run_that_lost_nothing(there: Place, story: Story) -> None:
    calm = Run(there, story.run.root, f"undisturbed-{there.namespace[-8:]}")
    calm.submit(*TRAINING, "data.pause_s=0")
    calm.wait()
    assert Start.numbers(calm.folder) == [1]
    assert ledger_toy.slots(story.run.ledger) == ledger_toy.slots(calm.ledger)
    assert len(ledger_toy.slots(calm.ledger)) == STEPS
    assert list(differences(locate(story.run.folder.url), locate(calm.folder.url))) == []


def test_a_config_that_cannot_run_ends_the_job_at_once_and_status_says_why(there: Place) -> None:
    assert there.root is not None
    run = Run(there, there.root, f"mistaken-{there.namespace[-8:]}")
    run.submit(*TRAINING, "job.nodes=2", "data.samples=none")
    run.wait("Failed")
    assert run.job["status"].get("failed", 0) <= 2
    assert "failed: the config cannot run" in run.everstep("status", run.name, "--root", str(there.root))


def test_an_image_that_is_not_there_is_said_while_the_job_waits(there: Place) -> None:
    assert there.root is not None
    run = Run(there, there.root, f"imageless-{there.namespace[-8:]}")
    words = ["status", run.name, "--root", str(there.root)]
    run.submit(*TRAINING, "job.image=nowhere.invalid/none:1")
    run.until(lambda: "nowhere.invalid/none:1" in run.everstep(*words), "reason")
    assert "change job.image" in run.everstep(*words)
    run.everstep("cancel", run.name, "--root", str(there.root))
    run.until_gone()


def test_resume_puts_a_new_job_in_place_of_one_that_would_wait_for_long(there: Place) -> None:
    assert there.root is not None
    root, training = str(there.root), [*TRAINING, "job.nodes=2", "steps=40"]
    worn = Run(there, there.root, f"worn-{there.namespace[-8:]}")
    resume = ["resume", worn.name, "plugins=[support.toy,support.ledger_toy]", "--root", root]
    worn.submit(*training, "data.pause_s=0.5")  # or it may end before all that follows has been said and done
    worn.wait_for_step(6)
    assert "is training already" in worn.everstep(*resume, code=2)
    old, pod = worn.job["metadata"]["name"], worn.pod(1)["metadata"]["name"]
    path = f"/api/v1/namespaces/{there.namespace}/pods/{pod}"
    # As if its index had lost six pods before.
    there.client.change(path, {"metadata": {"annotations": {IGNORED: "6"}}})
    there.evict(worn.pod(1))
    waits = "pod 1: is started again only in"
    worn.until(lambda: waits in worn.everstep("status", worn.name, "--root", root), "word of the long wait")
    assert f"/job/{old}" in worn.everstep(*resume).partition("a new job takes the place of ")[2].splitlines()[0]
    assert worn.job["metadata"]["name"] != old
    worn.wait()
    there.until(lambda: not there.job(old))
    assert list(ledger_toy.slots(worn.ledger)) == list(range(1, 41))
