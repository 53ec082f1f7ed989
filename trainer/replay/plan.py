"""Plan of a replay: the two checkpoints, faults of their records, and the scratch folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from blake3 import blake3

from everstep.config import FREE_ON_RESUME, LocalTierConfig, LogConfig, RunConfig
from everstep.dataset.index import ShardIndex
from everstep.dataset.verify import verify
from everstep.errors import ConfigError, DataError
from everstep.frozen_config import attempt_config, changes, digest, freeze, thaw
from everstep.run_folder import CONFIG, MANIFEST, RUN_ID, RunFolder
from everstep.trainer.checkpoint.manifest import CheckpointRef, Committed, candidates, find_fault
from everstep.trainer.data.ordering.data_record import read_record
from everstep.trainer.data.ordering.exclusion import Exclusion

PLAN = "plan.json"
"""File in the scratch folder, beside the run folder in it."""
SCHEDULE = "schedule.over_steps"


@dataclass
class Plan:
    """Facts of a replay before it runs."""

    first: str
    """Path of checkpoint A in the run folder."""
    last: str
    first_manifest: str
    """BLAKE3 of the manifest of A."""
    last_manifest: str
    step: int
    """Step of B."""
    attempt: int
    """Attempt that wrote B."""
    world: int
    """Processes that wrote B."""
    problems: list[str] = field(default_factory=list)
    """Faults for which B cannot be proved, a line each."""

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


def prepare(run: RunFolder, scratch: RunFolder, first: int, last: int) -> Plan:
    """Check both checkpoints, config and data; copy A and the config into the scratch folder.

    Raises:
        ConfigError: there is no such checkpoint, or the steps between them cannot be replayed as one.
    """
    a, b = (_checkpoint(run, step, option) for step, option in ((first, "--from"), (last, "--to")))
    if first >= last:
        raise ConfigError(f"--to {last}: it must be after --from {first}")
    one, other = (blake3(run.storage.read(f"{found.path}/{MANIFEST}")).hexdigest() for found in (a, b))
    world = b.manifest.world if isinstance(b, Committed) else 1
    plan = Plan(a.path, b.path, one, other, last, b.attempt, world)
    plan.problems += [f"checkpoint {each.path}: {fault}" for each in (a, b) if (fault := _fault(run, each))]
    if isinstance(a, Committed) and isinstance(b, Committed) and not plan.problems:
        config = attempt_config(run, b.attempt)
        if config is None:
            raise ConfigError(f"--to {last}: attempt {b.attempt} of {run.url} has no {CONFIG}, so nothing says how to")
        _check_one_config(run, a.step, b, config)
        plan.problems += [*_config_problems(run, b, config), *_data_problems(run, a, b)]
        if not plan.problems:
            _copy(run, scratch, a, config, last)
    return plan


def _checkpoint(run: RunFolder, step: int, option: str) -> CheckpointRef:
    listed = list(candidates(run))
    for found in listed:
        if found.step == step:
            return found
    there = ", ".join(str(each) for each in sorted({found.step for found in listed})) or "none"
    raise ConfigError(f"{option} {step}: {run.url} has no checkpoint of this step; there are {there}")


def _fault(run: RunFolder, found: CheckpointRef) -> str:
    if not isinstance(found, Committed):
        return found.why
    return find_fault(run.storage, found.path, found.manifest.files.items())


def _check_one_config(run: RunFolder, first: int, b: Committed, config: RunConfig) -> None:
    """Raise ConfigError if an attempt between the two checkpoints trained with another config."""
    starts = run.lineage().restored
    for attempt in sorted(number for number in starts if number < b.attempt and starts[number] < b.step):
        ended = min((starts[later] for later in starts if later > attempt), default=b.step)
        other = attempt_config(run, attempt) if ended > first else None
        if other is not None and (keys := _fixed_changes(other, config)):
            raise ConfigError(
                f"--from {first}: attempt {attempt} trained to step {ended} with another config ({'; '.join(keys)}); "
                f"replay up to there, or from a checkpoint of step {ended} or later"
            )


def _fixed_changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the changes of keys that decide what a step computes."""
    free = tuple(key for key in FREE_ON_RESUME if key not in ("hooks", "plugins"))
    found = changes(old, new)
    return [str(each) for each in found if not any(each.key == key or each.key.startswith(f"{key}.") for key in free)]


def _config_problems(run: RunFolder, b: Committed, config: RunConfig) -> Iterator[str]:
    name = run.attempt(b.attempt, CONFIG)
    if digest(config) != b.manifest.config_digest:
        yield f"config: {name} is not the config that {b.path} was trained with (digest {b.manifest.config_digest})"
    root = thaw(run.storage.read(CONFIG))
    if found := _fixed_changes(config, root):
        yield f"config: {CONFIG} was changed since: {'; '.join(found)}"
    if fault := Exclusion(root.exclude).fault(b.manifest.values, b.step):
        yield f"config: exclude was changed since: {b.path}: {fault}"


def _data_problems(run: RunFolder, a: Committed, b: Committed) -> Iterator[str]:
    if a.manifest.data_digest != b.manifest.data_digest:
        yield f"data: {a.path} and {b.path} were trained on different datasets"
    for record in read_record(run):
        if record.files:
            yield from (
                f"data: {fault}" for fault in data_faults(record.place, None if record.weights else record.digest)
            )


def data_faults(place: str, expected: str | None) -> Iterator[str]:
    """Yield what is wrong with a prepared dataset that has to be the one with this digest; None takes any."""
    try:
        found = ShardIndex.read(place).digest
        if expected is not None and found != expected:
            yield f"{place} is another dataset: its digest is {found[:12]}, that of the run {expected[:12]}"
        yield from map(str, verify(place))
    except DataError as error:
        yield str(error)


def _copy(run: RunFolder, scratch: RunFolder, a: Committed, config: RunConfig, last: int) -> None:
    """Make the scratch folder a run that has checkpoint A, and that is done at the step of B."""
    for name in (*a.manifest.files, MANIFEST):  # the manifest last, since it commits the rest
        path = f"{a.path}/{name}"
        size, at = run.storage.size(path), 0
        with scratch.storage.writer(path) as target:
            while at < size:
                at += target.write(run.storage.read_range(path, at, min(size, at + COPY_BYTES)))
    if run.storage.exists(RUN_ID):
        scratch.storage.write(RUN_ID, run.storage.read(RUN_ID))
    scratch.storage.write(CONFIG, freeze(replayed(config, last)).encode())


COPY_BYTES = 16 << 20


def replayed(config: RunConfig, last: int) -> RunConfig:
    """Return the config that trains up to a step as the run did, without trackers."""
    changed: dict[str, Any] = {
        "steps": last,
        "steps_given": None,
        "schedule": replace(config.schedule, over_steps=config.schedule.over_steps or config.steps),
        "checkpoint": replace(config.checkpoint, local=LocalTierConfig(every=None), self_test=False),
        "log": LogConfig(every=config.log.every),
        "resume": replace(config.resume, allow=[*config.resume.allow, SCHEDULE]),
    }
    return replace(config, **changed)
