"""Compose a command line into a RunConfig; freeze it as the run folder's config.yaml, and thaw it.

Hydra composes (groups in conf/ and in the user's folders), the dataclasses in config check. Workers read the frozen
file, so restart 7 runs what start 1 ran, regardless of changes in the checkout.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from everstep.config import FREE_ON_RESUME, OPEN_NODES, Node, RunConfig, first_steps_without, meant
from everstep.config_errors import in_one_line, of_a_word
from everstep.errors import ConfigError, nearest
from everstep.run_folder import CONFIG, RunFolder

if TYPE_CHECKING:
    from everstep.hydra_schema import Composition

T = TypeVar("T")
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


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Composed:
    """Compose and check; one-line ConfigError for any user error."""
    folders = _folders(config_dirs)
    composition, experiment = _compose(overrides, folders)
    run = RunConfig(**{f.name: getattr(composition, f.name) for f in dataclasses.fields(RunConfig)})
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
    """Compose the keys of the job, `run` and `run_root`; ConfigError for any other key."""
    for text in overrides:
        key = text.lstrip("+~").split("=", 1)[0]
        if key.split(".")[0] != "job" and key not in ("run", "run_root"):
            raise ConfigError(f"{text!r} is for our trainer; give it to the program that stands after --")
    composition, _ = _compose(overrides, _folders(config_dirs))
    return ComposedJob(composition.job or {}, composition.run, composition.run_root)


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
        return _to_object(tree, Composition), experiment
    except AssertionError as error:  # raised by OmegaConf for a key below a plug-in that is null
        raise ConfigError(f"a key was given below a plug-in that is null: {', '.join(overrides)}") from error
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(in_one_line(error, keys(), groups(folders[1:]))) from error


def with_name(composed: Composed, moment: datetime.datetime) -> RunConfig:
    """Return the config with a name: the given one, or experiment and time."""
    if composed.run.run is not None:
        return composed.run
    name = f"{composed.experiment or 'run'}-{moment:%Y%m%d-%H%M%S}"
    return dataclasses.replace(composed.run, run=name.replace("/", "-"))


def freeze(config: RunConfig) -> str:
    """Return the resolved config as YAML text, equal to OmegaConf's in a third of the time."""
    text: str = yaml.dump(plain(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


class _Dumper(yaml.Dumper):
    """YAML dumper that quotes all strings that OmegaConf, beyond YAML 1.1, reads as numbers or booleans."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _word(dumper: yaml.Dumper, text: str) -> yaml.ScalarNode:
    from omegaconf._utils import is_float, is_int, yaml_is_bool

    quoted = yaml_is_bool(text) or is_int(text) or is_float(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _word)


def thaw(text: str) -> RunConfig:
    """Parse the text of `freeze`; ConfigError when it is invalid."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text))
        return _to_object(tree, RunConfig)
    except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config.yaml of the run folder: {in_one_line(error, keys())}") from error


def digest(config: RunConfig) -> str:
    import hashlib  # imported late, as it loads OpenSSL

    return hashlib.sha256(freeze(config).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """One key that differs between two configs."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    before, after = dict(_leaves(plain(old))), dict(_leaves(plain(new)))
    keys = sorted(before.keys() | after.keys())
    return [Change(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def changes_since(config: RunConfig, folder: RunFolder) -> list[Change]:
    """Return the changes against the run's config; ConfigError for a forbidden one once a step was done."""
    old = thaw(folder.storage.read(CONFIG).decode())
    found = changes(old, config)
    return found if not found or folder.never_trained() else refuse_changes(old, config)


def refuse_changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Return all changes if each is allowed on resume; else ConfigError with the forbidden ones."""
    found = changes(old, new)
    free = (*FREE_ON_RESUME, *new.resume.allow)
    refused = [c for c in found if not any(c.key == key or c.key.startswith(f"{key}.") for key in free)]
    if refused:
        names = ",".join(sorted({change.key for change in refused}))
        listed = "; ".join(str(change) for change in refused)
        raise ConfigError(
            f"run {new.run!r} was started with another config ({listed}); "
            f"start a new run, or change these on purpose with 'resume.allow=[{names}]'"
        )
    return found


def settle(config: RunConfig, folder: RunFolder) -> list[Change]:
    """Write the config into the run folder; return the changes since, or ConfigError for a forbidden one.

    Every start calls this first: of two starters one creates the file, and the config of the other is checked against
    it. A config under which no step was ever done does not bind.
    """
    text = freeze(config).encode()
    if folder.storage.create(CONFIG, text):
        return []
    found = changes_since(config, folder)
    if any(change.key.split(".")[0] == "exclude" for change in found):
        _refuse_rewriting(thaw(folder.storage.read(CONFIG).decode()), config, folder.reached_step())
    if found:
        folder.storage.write(CONFIG, text)
    return found


def _refuse_rewriting(old: RunConfig, new: RunConfig, reached: int) -> None:
    """Raise ConfigError if `exclude` would change the samples of steps already done."""
    before, after = first_steps_without(old.exclude), first_steps_without(new.exclude)
    past = ({sample: first for sample, first in found.items() if first <= reached} for found in (before, after))
    was, will_be = past
    if was != will_be:
        sample = min(was.items() ^ will_be.items())[0]
        raise ConfigError(
            f"exclude would change steps that run {new.run!r} has behind it (it has reached step {reached}): sample "
            f"{sample} was {_use(was, sample)} and would be {_use(will_be, sample)}; set exclude.from_step to "
            f"{reached + 1} or later"
        )


def _use(first: dict[int, int], sample: int) -> str:
    return f"left out from step {first[sample]} on" if sample in first else "used"


def _to_object(tree: Any, kind: type[T]) -> T:
    value = OmegaConf.to_object(tree)
    if not isinstance(value, kind):
        raise ConfigError(f"the config composes to {type(value).__name__}, not to {kind.__name__}")
    return value


def plain(config: RunConfig) -> dict[str, Any]:
    """Return the config as dicts, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    converted: dict[str, Any] = convert(dataclasses.asdict(config))
    return converted


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keys() -> list[str]:
    """Return every key of RunConfig, dotted."""
    return [key for key, _ in _leaves(plain(RunConfig()))]


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
        elif key.split(".")[0] in (*OPEN_NODES, "job"):
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
