"""Plan of a sweep: composed from a command line and frozen, or loaded from its folder."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from everstep import frozen_yaml
from everstep.compose import Composed, compose, groups, sweep_files
from everstep.config import Goal, RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import changes, digest, freeze, thaw
from everstep.import_path import import_from_here
from everstep.launch.config import JobConfig, job_config, job_yaml
from everstep.launch.sweep import config as keys
from everstep.launch.sweep.asha import rungs
from everstep.launch.sweep.base_config import Base, check_key
from everstep.launch.sweep.config import FREE, RUNGED, SweepConfig, sweep_config
from everstep.launch.sweep.given import given_sweep, value_of
from everstep.launch.sweep.search_space import Axis, axis, identity, is_sweep
from everstep.launch.sweep.sweep_folder import SWEEP, SweepFolder
from everstep.security.access import make_folder
from everstep.security.secret_detection import refuse_secrets
from everstep.storage import join_url

LARGEST_SWEEP = 64 * frozen_yaml.MOST_BYTES
"""Bytes of sweep.yaml, which holds a config for each combination of config groups."""
Constraint = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass
class Plan:
    """Complete description of a sweep, known before any trial starts."""

    folder: SweepFolder
    sweep: SweepConfig
    axes: tuple[Axis, ...]
    job: JobConfig
    bases: dict[str, Base]
    """Choice of config groups, as JSON → the composed config."""
    base_digest: str
    """Digest of the config without the swept keys."""

    @property
    def metrics(self) -> list[str]:
        return self.sweep.metric or [self.any_config.evaluate.metric]

    @property
    def goals(self) -> list[Goal]:
        said = self.sweep.goal or [self.any_config.evaluate.goal]
        return said * len(self.metrics) if len(said) == 1 else said

    @property
    def any_config(self) -> RunConfig:
        return next(iter(self.bases.values())).config

    @property
    def plugins(self) -> list[str]:
        """Packages that any trial may import."""
        return sorted({name for base in self.bases.values() for name in base.config.plugins})

    @property
    def rung_count(self) -> int:
        return len(rungs(self.sweep, self.any_config))

    def steps(self, config: RunConfig) -> tuple[int, ...]:
        return rungs(self.sweep, config)

    def identity(self, values: Mapping[str, Any]) -> str:
        return identity(values, self.base_digest)

    def config(self, values: Mapping[str, Any], name: str, rung: int) -> RunConfig:
        """Return the config of a trial up to a rung. Its learning-rate schedule always spans the last rung."""
        grouped = {axis.key for axis in self.axes if axis.is_group}
        chosen = json.dumps({key: values[key] for key in values if key in grouped}, sort_keys=True)
        if chosen not in self.bases:
            raise ConfigError(f"trial {name}: the constraint gives config groups that were not swept ({chosen})")
        for key in values:
            if key.split(".")[0] == "plugins":  # a trial's record could otherwise name code to import
                raise ConfigError(f"trial {name}: {key} is not a key that a trial may change")
        made = self.bases[chosen].with_values({key: value for key, value in values.items() if key not in grouped})
        steps = self.steps(made)
        schedule = made.schedule
        if self.sweep.pruner in RUNGED and schedule.over_steps is None:
            schedule = dataclasses.replace(schedule, over_steps=steps[-1])
        wandb = made.log.wandb
        if wandb.group is None:
            wandb = dataclasses.replace(wandb, group=self.folder.name)
        log = dataclasses.replace(made.log, wandb=wandb, hparams=dict(values))
        return dataclasses.replace(
            made, run=name, run_root=self.folder.trials_url, steps=steps[rung], schedule=schedule, log=log
        )

    def constraint(self) -> Constraint:
        """Return the user's constraint function, or the identity when there is none."""
        where = self.sweep.constraint
        if where is None:
            return lambda values: values
        module, _, function = where.rpartition(".")
        if module.split(".")[0] not in [name.split(".")[0] for name in self.any_config.plugins]:
            raise ConfigError(f"sweep.constraint={where}: its package is not in plugins; add plugins=[{module}]")
        import_from_here()
        try:
            found: Constraint = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"sweep.constraint={where}: {error}") from error
        return found


def plan(words: Sequence[str], config_dirs: Sequence[str] = ()) -> Plan:
    """Compose a command line, once for each combination of the config groups that are swept."""
    folders = [Path(name).expanduser() for name in config_dirs]
    own = [word for word in words if word.split("=")[0] == "sweep" or word.startswith("sweep.")]
    sweep = given_sweep(own, sweep_files(folders))
    rest = [word for word in words if word not in own]
    swept = [word for word in rest if is_sweep(word)]
    given = {word.split("=")[0] for word in swept}
    swept += [text for text in sweep.space if text.split("=")[0] not in given | {word.split("=")[0] for word in rest}]
    if not swept:
        raise ConfigError("nothing is swept; give a key several values, like optimizer.lr=1e-4,3e-4 or seed=range(0,3)")
    options = groups(folders)
    refuse_secrets(swept, "the sweep")
    refuse_secrets(keys.plain(sweep), "sweep")
    axes = tuple(axis(text, options, sweep.seed) for text in swept)
    for each in axes:
        _check_axis(each, options)
    fixed = [word for word in rest if word not in swept]
    bases, composed = _composed(fixed, axes, config_dirs)
    run = composed.run
    base_digest = digest(dataclasses.replace(run, run=None, run_root=RunConfig().run_root))
    name = run.run or _name(composed, base_digest, axes)
    folder = SweepFolder(join_url(run.run_root, name))
    return Plan(folder, sweep, axes, job_config(composed.job), bases, base_digest)


def _name(composed: Composed, base_digest: str, axes: Sequence[Axis]) -> str:
    """Return a name that depends on the swept keys but not their values, so the command resumes its sweep."""
    what = identity({axis.key: None for axis in axes}, base_digest)
    return f"{composed.experiment or 'run'}-sweep-{what[:6]}".replace("/", "-")


def _check_axis(each: Axis, options: Mapping[str, Sequence[str]]) -> None:
    if not each.is_group:
        check_key(each.key)
        return
    for name in each.choices:
        if name is None or str(name) not in options[each.key]:
            raise ConfigError(
                f"{each.key}={name}: there is no such {each.key}; there are {', '.join(options[each.key])}"
            )


def _composed(
    fixed: Sequence[str], axes: Sequence[Axis], config_dirs: Sequence[str]
) -> tuple[dict[str, Base], Composed]:
    """Return all combinations, and the first composed config."""
    grouped = [axis for axis in axes if axis.is_group]
    bases: dict[str, Base] = {}
    first: Composed | None = None
    for row in itertools.product(*(each.choices for each in grouped)):
        chosen = dict(zip((each.key for each in grouped), row, strict=True))
        composed = compose([*(f"{key}={name}" for key, name in chosen.items()), *fixed], config_dirs)
        bases[json.dumps(chosen, sort_keys=True)] = Base(composed.run)
        first = first or composed
    if first is None:
        raise ConfigError("nothing is swept")
    return bases, first


def settle(plan: Plan) -> Plan:
    """Freeze the plan in the sweep's folder; for an existing sweep, update the keys that may change.

    ConfigError when the folder holds a different sweep.
    """
    make_folder(plan.folder.storage, plan.any_config.access)
    if plan.folder.storage.create(SWEEP, _text(plan).encode()):
        return plan
    old = load(plan.folder)
    _refuse_other(old, plan)
    # Configs composed earlier are kept: later edits of conf/ do not change existing trials.
    merged = dataclasses.replace(plan, bases={**plan.bases, **old.bases}, base_digest=old.base_digest)
    if _text(merged) != _text(old):
        plan.folder.storage.write(SWEEP, _text(merged).encode())
    return merged


def _refuse_other(old: Plan, new: Plan) -> None:
    before, after = keys.plain(old.sweep), keys.plain(new.sweep)
    found = [
        f"sweep.{key}: {before[key]} → {after[key]}"
        for key in before
        if before[key] != after[key] and key not in (*FREE, "space")
    ]
    if {axis.key for axis in old.axes} != {axis.key for axis in new.axes}:
        was, wanted = (", ".join(sorted(axis.key for axis in each.axes)) for each in (old, new))
        found.append(f"swept keys: {was} → {wanted}")
    if old.base_digest != new.base_digest:
        known = next((key for key in new.bases if key in old.bases), None)
        differing = (
            []
            if known is None
            else changes(*(dataclasses.replace(each.bases[known].config, run=None, run_root="") for each in (old, new)))
        )
        found += [str(change) for change in differing]
    if found:
        raise ConfigError(
            f"sweep {old.folder.name!r} was started otherwise ({'; '.join(found) or 'another base'}); "
            f"give another run=NAME, or go on with 'everstep resume {old.folder.url}'"
        )


def _text(plan: Plan) -> str:
    tree = {
        "sweep": keys.plain(plan.sweep),
        "axes": [dataclasses.asdict(axis) | {"choices": list(axis.choices)} for axis in plan.axes],
        "base_digest": plan.base_digest,
        "job": yaml.safe_load(job_yaml(plan.job)),
        "bases": [{"groups": json.loads(key), "config": freeze(base.config)} for key, base in plan.bases.items()],
    }
    return frozen_yaml.dump(tree)


def load(folder: SweepFolder) -> Plan:
    """Load the plan that `settle` froze. ConfigError when there is none or it is damaged."""
    try:
        tree = frozen_yaml.read(folder.storage.read(SWEEP), SWEEP, LARGEST_SWEEP)
        axes = tuple(Axis(**{**each, "choices": tuple(each["choices"])}) for each in tree["axes"])
        bases = {json.dumps(each["groups"], sort_keys=True): Base(thaw(each["config"])) for each in tree["bases"]}
        return Plan(folder, sweep_config(tree["sweep"]), axes, job_config(tree["job"]), bases, tree["base_digest"])
    except FileNotFoundError as error:
        raise ConfigError(f"{folder.url} is no sweep: it has no {SWEEP}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder.url}/{SWEEP} is damaged: {str(error).splitlines()[0]}") from error


def amended(plan: Plan, words: Sequence[str]) -> Plan:
    """Return the plan with overrides applied: keys of the job, and keys of the sweep that may change."""
    sweep, job = keys.plain(plan.sweep), yaml.safe_load(job_yaml(plan.job))
    for word in words:
        key, value = word.partition("=")[0], value_of(word)
        if key.startswith("sweep.") and key.removeprefix("sweep.") in FREE:
            sweep[key.removeprefix("sweep.")] = value
        elif key.startswith("job.") and key.count(".") == 1:
            job[key.removeprefix("job.")] = value
        elif key != "plugins":
            free = ", ".join(f"sweep.{name}" for name in FREE)
            raise ConfigError(
                f"{word!r}: of a sweep that goes on only {free} and job.* may change; to widen its space "
                f"give 'everstep sweep' the whole command again"
            )
    return dataclasses.replace(plan, sweep=sweep_config(sweep), job=job_config(job))


def named_plugins(plan: Plan, words: Sequence[str]) -> list[str]:
    """Return the packages that the command line names; ConfigError if the sweep does not use one."""
    named = [str(name) for word in words if word.startswith("plugins=") for name in value_of(word)]
    if unknown := [name for name in named if name not in plan.plugins]:
        used = ", ".join(plan.plugins) or "none"
        raise ConfigError(f"plugins=[{','.join(unknown)}]: the sweep does not use this package (it uses {used})")
    return named
