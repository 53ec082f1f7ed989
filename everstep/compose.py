"""Composition of a command line into a RunConfig.

Hydra composes (groups in conf/ and in the user's folders), the dataclasses in config check. Workers read the frozen
file, so restart 7 runs what start 1 ran, regardless of changes in the checkout.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf.errors import OmegaConfBaseException

from everstep.config import OPEN_KEYS, OPEN_NODES, UNRESOLVED, Access, Node, RunConfig, meant
from everstep.config_errors import in_one_line, of_a_word
from everstep.errors import ConfigError, nearest
from everstep.frozen_config import keys, plain, to_object
from everstep.security.config_trust import reason_for_distrust, refuse_code, without_environment
from everstep.security.secret_detection import refuse_secrets

if TYPE_CHECKING:
    from everstep.hydra_schema import Composition

SWEEPS = "sweep"
"""Folder of sweeps in conf/."""
OWN_FOLDER = "; one of your own needs --config-dir FOLDER"
LISTS = [f.name for f in dataclasses.fields(RunConfig) if str(f.type).startswith("list")]


@dataclass(frozen=True)
class Composed:
    """Result of a composition: the run's config, the job's keys, and the name of the experiment."""

    run: RunConfig
    job: Node
    experiment: str | None


def conf_dir() -> Path:
    """Return the folder of Everstep's own YAML."""
    return Path(__file__).parent / "conf"


@dataclass(frozen=True)
class ComposedJob:
    """The launcher's half alone, for a program other than the trainer; it also has a run folder."""

    job: Node
    run: str | None
    run_root: str
    access: Access


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Composed:
    """Compose and check; one-line ConfigError for any user error."""
    folders = _folders(config_dirs)
    composition, experiment = _trusted(overrides, folders)
    run = RunConfig(**{f.name: getattr(composition, f.name) for f in dataclasses.fields(RunConfig)})
    if run.steps_given is not None and run.steps != UNRESOLVED:
        raise ConfigError(f"steps_given={run.steps_given} is set by itself; write steps={run.steps_given}")
    refuse_secrets(plain(run), "")
    refuse_secrets(composition.job or {}, "job")
    if run.task is None or run.data is None:
        missing = "task" if run.task is None else "data"
        options = ", ".join(_options("experiment", folders))
        raise ConfigError(f"{missing}=null: nothing to train; give experiment=NAME ({options}) or {missing}=NAME")
    for name in OPEN_NODES:
        node = getattr(run, name)
        if node is not None and "_target_" not in node:
            raise ConfigError(f"{name} has keys ({', '.join(node)}) but no _target_; give {name}=NAME")
    return Composed(run, composition.job or {}, experiment)


def compose_job(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> ComposedJob:
    """Compose the keys of the job, `run`, `run_root` and `access`; ConfigError for any other key."""
    for text in overrides:
        key = text.lstrip("+~").split("=", 1)[0]
        if key.split(".")[0] != "job" and key not in ("run", "run_root", "access"):
            raise ConfigError(f"{text!r} is for our trainer; give it to the program that stands after --")
    composition, _ = _trusted(overrides, _folders(config_dirs))
    refuse_secrets(composition.job or {}, "job")
    return ComposedJob(composition.job or {}, composition.run, composition.run_root, composition.access)


def _trusted(overrides: Sequence[str], folders: list[Path]) -> tuple[Composition, str | None]:
    """Compose; ConfigError if a folder of another user makes something run beyond the command line."""
    strange = {folder: why for folder in folders[1:] if (why := reason_for_distrust(folder)) is not None}
    with without_environment(list(strange.values())):
        composition, experiment = _compose(overrides, folders)
        if strange:
            own = [folder for folder in folders if folder not in strange]
            said, _ = _compose([text for text in overrides if _is_of_a_job(text, own)], own)
            refuse_code(next(iter(strange.values())), vars(composition), vars(said))
    return composition, experiment


def _is_of_a_job(text: str, folders: list[Path]) -> bool:
    """True for a word about plugins or the job, unless it chooses a config that is in none of the folders."""
    key, _, value = text.lstrip("+~").partition("=")
    return key == "plugins" or key.startswith("job.") or (key == "job" and value in groups(folders[1:])["job"])


def _compose(overrides: Sequence[str], folders: list[Path]) -> tuple[Composition, str | None]:
    """Return the composition of all keys, and the name of the experiment."""
    import hydra
    from hydra.errors import HydraException

    from everstep.hydra_schema import Composition, register

    experiment, cleaned = _checked(overrides, folders)
    if len(folders) > 1:
        cleaned.append(f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]")
    register()
    try:
        with hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
            tree = hydra.compose("run", overrides=cleaned)
        return to_object(tree, Composition), experiment
    except AssertionError as error:  # raised by OmegaConf for a key below a plug-in that is null
        raise ConfigError(f"a key was given below a plug-in that is null: {', '.join(overrides)}") from error
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(in_one_line(error, keys(), groups(folders[1:]))) from error


def groups(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Return config groups and their options, ours and the user's."""
    searched = [conf_dir(), *folders]
    names = {entry.name for folder in searched for entry in folder.iterdir() if entry.is_dir()}
    return {
        name: _options(name, searched) for name in sorted(names - {SWEEPS}) if name.isidentifier() and name[0] != "_"
    }


def sweep_files(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Return the sweep files in conf/sweep by name, ours and the user's: no config group of a run."""
    searched = [conf_dir(), *folders]
    return {file.stem: file for folder in searched for file in sorted((folder / SWEEPS).glob("*.yaml"))}


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted(
        {
            str(file.relative_to(folder / group).with_suffix(""))
            for folder in folders
            for file in (folder / group).rglob("*.yaml")
        }
    )


def _folders(config_dirs: Sequence[str]) -> list[Path]:
    """Return our config folder, then the user's."""
    return [conf_dir(), *(_folder(name) for name in config_dirs)]


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {name}: no such folder")
    return folder


def _checked(overrides: Sequence[str], folders: list[Path]) -> tuple[str | None, list[str]]:
    """Refuse unknown keys and options with the nearest one; open nodes accept any key (`++`) of a plug-in."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known_groups, known_keys = groups(folders[1:]), keys()
    experiment, cleaned = None, []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            hint = of_a_word(text, known_keys, known_groups) or f": {in_one_line(error)}; write key=value"
            raise ConfigError(f"cannot read {text!r}{hint}") from error
        key, value = override.key_or_group, override.value()
        if key in LISTS and isinstance(value, str):
            raise ConfigError(f"{text}: {key} is a list; write '{key}=[{value}]'")
        if override.is_sweep_override():
            raise ConfigError(f"{text!r} names several values: only 'everstep sweep' takes them")
        if key in known_groups:
            _check_option(key, value, known_groups[key], "" if folders[1:] else OWN_FOLDER)
            text = f"~{key}" if value is None else text
            experiment = str(value) if key == "experiment" and value else experiment
        elif any(key == free or key.startswith(f"{free}.") for free in (*OPEN_KEYS, "job")):
            text = text if text[0] in "+~" else f"++{text}"
        elif key not in known_keys and not any(k.startswith(f"{key}.") for k in known_keys):
            raise ConfigError(f"no key {key!r}{meant(key, [*known_keys, *known_groups])}")
        cleaned.append(text)
    return experiment, cleaned


def _check_option(group: str, value: object, options: list[str], hint: str) -> None:
    if value is not None and str(value) not in options:
        near = nearest(str(value), options)
        raise ConfigError(
            f"{group}={value}: there is no such {group}{near}; there are {', '.join(options)}{'' if near else hint}"
        )


def with_name(composed: Composed, moment: datetime.datetime) -> RunConfig:
    """Return the config with a name: the given one, or experiment and time."""
    if composed.run.run is not None:
        return composed.run
    name = f"{composed.experiment or 'run'}-{moment:%Y%m%d-%H%M%S}"
    return dataclasses.replace(composed.run, run=name.replace("/", "-"))
