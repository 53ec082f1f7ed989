"""Kubernetes as a scheduler: submit, find, query and cancel jobs."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any
from urllib.parse import quote, unquote

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.console import say
from everstep.launch.schedulers.base import Ask, Program, Rendered
from everstep.launch.schedulers.job import JobHandle, JobState, JobStatus
from everstep.launch.schedulers.kubernetes import labels
from everstep.launch.schedulers.kubernetes.capacity import lacking
from everstep.launch.schedulers.kubernetes.client import RETRY_S, Client, Refused, owned_by
from everstep.launch.schedulers.kubernetes.informer import Mirrors, Place
from everstep.launch.schedulers.kubernetes.job_status import FAILED_CREATE, lacks_pods, queued, standing
from everstep.launch.schedulers.kubernetes.labels import JOB_NAME, JOBSET_NAME, MANAGER, token_label, token_secret
from everstep.launch.schedulers.kubernetes.manifest import manifest, objects
from everstep.launch.schedulers.kubernetes.validate import mistakes
from everstep.security.job_secrets import TOKEN, new_secret

MANAGED = {"app.kubernetes.io/managed-by": MANAGER}
WORKLOADS = ("Job", "JobSet", "TrainJob")
CURRENT = "current"
"""Cluster part of a handle that means the kubeconfig's current context."""
Look = Callable[[Place, str], list[dict[str, Any]]]
"""Return all our objects of one kind in a context and namespace."""


@dataclass(frozen=True)
class Kubernetes:
    """Kubernetes cluster and namespace: from the config for new jobs, from the handle for existing ones."""

    job: JobConfig = field(default_factory=lambda: JobConfig(scheduler="k8s"))
    retry_s: float = RETRY_S

    def render(self, job: JobConfig, program: Program) -> Rendered:
        made = objects(job, program)
        found = tuple(mistakes(job, program, made))
        return Rendered(("kubectl", "apply", "-f", "-"), manifest=manifest(made), mistakes=found)

    def problems(self, job: JobConfig, program: Program | None = None) -> list[str]:
        """Return what the API server would accept although it cannot work, and what no node has.

        With `program` also check that the pods can see its run folder, and the contents of its config.
        """
        known = program or Program("everstep-check", "memory://everstep-check", (), "check")
        made = objects(job, known)
        return [*mistakes(job, known, made), *lacking(job, made[-1], self._client, say)]

    def submit(self, rendered: Rendered) -> JobHandle:
        """Apply settings, service and policy before the job, which then owns them: no pod waits for one."""
        import yaml

        made = list(yaml.safe_load_all(rendered.manifest))
        *before, main = made
        there = [self._client.apply(thing) for thing in before]
        if TOKEN in rendered.manifest:
            self._make_token(main["metadata"], {**before[0], "metadata": there[0]["metadata"]})
        job = self._client.apply(main)
        for thing in before:
            self._client.own(thing["kind"], thing["metadata"]["name"], {**main, "metadata": job["metadata"]})
        return self._handle(main["kind"], main["metadata"]["name"])

    def _make_token(self, job: Mapping[str, Any], settings: dict[str, Any]) -> None:
        """Make the Secret by which the pods of a job recognize each other.

        It is deleted with the job's ConfigMap, and is in no manifest. A repeated submission keeps the existing one.
        """
        metadata = {"name": token_secret(job["name"]), "labels": job["labels"], "ownerReferences": [owned_by(settings)]}
        thing = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "immutable": True,
            "data": {TOKEN: base64.b64encode(new_secret().encode()).decode()},
        }
        try:
            self._client.create(f"/api/v1/namespaces/{self._client.namespace}/secrets", thing)
        except Refused as error:
            if error.code == 403:
                say("this account may not create secrets (k8s/rbac.yaml): the pods keep their token in the run folder")
            elif error.code != 409:
                raise

    def find(self, token: str) -> JobHandle | None:
        for kind in WORKLOADS:
            for each in self._client.list(kind, {labels.TOKEN: token_label(token)}):
                if not each["metadata"].get("ownerReferences"):  # the Job inside a JobSet has the same labels
                    return self._handle(kind, each["metadata"]["name"])
        return None

    def status(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """Return statuses by one list of jobs per kind and one of pods for each namespace."""
        return self._read(handles, lambda place, kind: self._client_of(place).list(kind, MANAGED))

    @contextlib.contextmanager
    def follow(self) -> Iterator[Ask]:
        """Return `status` on watched objects; a job that no watch has reported yet is queried."""
        with contextlib.closing(Mirrors(self._client_of, MANAGED)) as mirrors:

            def ask(handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
                found = self._read(handles, mirrors.look)
                strange = [handle for handle, status in found.items() if status.state is JobState.unknown]
                return {**found, **self.status(strange)}

            yield ask

    def cancel(self, handles: Sequence[JobHandle]) -> None:
        for handle in handles:
            _, kind, name = _parts(handle)
            self._client_of(_place(handle)).delete(kind, name)

    def _read(self, handles: Sequence[JobHandle], look: Look) -> dict[JobHandle, JobStatus]:
        found: dict[JobHandle, JobStatus] = {}
        for place, group in _by_place(handles).items():
            pods = look(place, "Pod")
            events = cache(partial(self._refusals, place))
            for kind in {_parts(handle)[1] for handle in group}:
                known = {each["metadata"]["name"]: each for each in look(place, kind)}
                ours = {handle: known.get(_parts(handle)[2]) for handle in group if _parts(handle)[1] == kind}
                waits = queued(self._client_of(place), [job for job in ours.values() if job is not None])
                found |= {handle: self._standing(kind, job, pods, waits, events) for handle, job in ours.items()}
        return found

    def _standing(
        self,
        kind: str,  # an object in a list does not repeat its kind
        job: dict[str, Any] | None,
        pods: Sequence[dict[str, Any]],
        waits: Mapping[str, str],
        events: Callable[[], list[dict[str, Any]]],
    ) -> JobStatus:
        if job is None:
            return JobStatus(JobState.unknown)
        label = JOB_NAME if kind == "Job" else JOBSET_NAME
        ours = [pod for pod in pods if pod["metadata"]["labels"].get(label) == job["metadata"]["name"]]
        missing = kind == "Job" and lacks_pods(job, ours, time.time())
        queue = waits.get(job["metadata"]["uid"], "")
        return standing(job, ours, self.job.k8s.restart_delay_s, queue, events() if missing else ())

    def _refusals(self, place: Place) -> list[dict[str, Any]]:
        """Return the events of jobs without pods, by one query for all jobs.

        Empty for an account that may not read events.
        """
        client = self._client_of(place)
        try:
            return client.items(f"/api/v1/namespaces/{client.namespace}/events?fieldSelector=reason%3D{FAILED_CREATE}")
        except Refused as error:
            if error.code != 403:
                raise
            return []

    @cached_property
    def _client(self) -> Client:
        return Client(self.job.k8s.context, self.job.k8s.namespace, self.retry_s)

    def _client_of(self, place: Place) -> Client:
        context, namespace = place
        if context == self.job.k8s.context and namespace == self._client.namespace:
            return self._client
        return Client(context, namespace, self.retry_s)

    def _handle(self, kind: str, name: str) -> JobHandle:
        context = quote(self.job.k8s.context or CURRENT, safe="")  # a context's name may hold any character
        return JobHandle("k8s", context, f"{self._client.namespace}/{kind.lower()}/{name}")


def _place(handle: JobHandle) -> Place:
    context = unquote(handle.cluster)
    return None if context == CURRENT else context, _parts(handle)[0]


def _parts(handle: JobHandle) -> tuple[str, str, str]:
    """Return namespace, kind and name."""
    words = handle.id.split("/")
    kinds = {kind.lower(): kind for kind in WORKLOADS}
    if len(words) != 3 or words[1] not in kinds:
        raise ConfigError(f"{handle} is not a job of Kubernetes: it should look like k8s://CONTEXT/NAMESPACE/job/NAME")
    return words[0], kinds[words[1]], words[2]


def _by_place(handles: Sequence[JobHandle]) -> dict[Place, list[JobHandle]]:
    found: dict[Place, list[JobHandle]] = {}
    for handle in handles:
        found.setdefault(_place(handle), []).append(handle)
    return found
