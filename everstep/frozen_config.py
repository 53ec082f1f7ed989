"""Config of a run as text: frozen, read back, compared, and changed only where a resume allows it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from everstep import frozen_yaml
from everstep.config import FREE_ON_RESUME, UNRESOLVED, RunConfig, first_steps_without, steps_of
from everstep.config.dotted import leaves
from everstep.config_errors import in_one_line
from everstep.errors import ConfigError
from everstep.run_folder import CONFIG, RunFolder
from everstep.run_id import ensure_run_id
from everstep.security.access import change_access, make_folder
from everstep.storage import read_limited

T = TypeVar("T")


def freeze(config: RunConfig) -> str:
    """Return the resolved config as YAML text, equal to OmegaConf's in a third of the time.

    Raises:
        ConfigError: the text is larger than `thaw` reads.
    """
    text: str = yaml.dump(plain(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    if len(text) > frozen_yaml.MOST_BYTES:
        raise ConfigError(
            f"the config has {len(text)} bytes (limit {frozen_yaml.MOST_BYTES}); shorten its longest list"
        )
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


PLACE = f"{CONFIG} of the run folder"


def thaw(text: str | bytes) -> RunConfig:
    """Parse the text of `freeze`; ConfigError when it is invalid."""
    try:
        text = frozen_yaml.checked(text, PLACE)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        tree = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text))
        return to_object(tree, RunConfig)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{PLACE}: {in_one_line(error, keys())}") from error


def digest(config: RunConfig) -> str:
    import hashlib  # imported late, as it loads OpenSSL

    return hashlib.sha256(freeze(config).encode()).hexdigest()[:16]


def start_digest(config: RunConfig) -> str:
    """Return the digest that a start has among its arguments: of all keys that differ from their defaults.

    A job that is queued while Everstep is upgraded can still start, since new keys have their defaults.
    """
    return _digest_of(_chosen(config))


def fixed_digest(config: RunConfig) -> str:
    """Return a digest of what may not change on a resume: as `start_digest`, without the free keys."""
    return _digest_of({key: value for key, value in _chosen(config).items() if not _is_free(key)})


def _chosen(config: RunConfig) -> dict[str, Any]:
    usual = dict(leaves(plain(RunConfig())))
    chosen = {key: value for key, value in leaves(plain(config)) if usual.get(key) != value}
    if config.steps_given is not None:  # their number is known only once the data is
        chosen.pop("steps", None)
    return chosen


def _digest_of(keys: dict[str, Any]) -> str:
    import hashlib  # imported late, as it loads OpenSSL

    return hashlib.sha256(yaml.safe_dump(keys).encode()).hexdigest()[:32]


def _is_free(key: str, more: Sequence[str] = ()) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in (*FREE_ON_RESUME, *more))


@dataclass(frozen=True)
class Change:
    """One key that differs between two configs."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"


def with_requests_of(old: RunConfig, new: RunConfig) -> RunConfig:
    """Return the new config with the samples that are left out on request, by `everstep data exclude`."""
    missing = [each for each in old.exclude if each.requested and each not in new.exclude]
    return dataclasses.replace(new, exclude=[*new.exclude, *missing]) if missing else new


def with_steps_of(old: RunConfig, new: RunConfig) -> RunConfig:
    """Return the new config with what the run has settled: its number of steps, samples left out.

    The same epochs or tokens are the same number of steps; `everstep data exclude` holds for all later starts.
    """
    new = with_requests_of(old, new)
    if new.steps != UNRESOLVED or new.steps_given != old.steps_given:
        return new
    return dataclasses.replace(new, steps=old.steps)


def resolve_steps(config: RunConfig, folder: RunFolder, samples: int, tokens: int | None = None) -> int:
    """Return the number of steps; the first start that knows it freezes it in the run folder.

    Args:
        tokens: those of each sample; None if it is not known.

    Raises:
        ConfigError: the length is in tokens, and `tokens` is None.
    """
    stored = thaw(folder.storage.read(CONFIG))
    found = with_steps_of(stored, config).steps
    if found != UNRESOLVED:
        return int(found)
    steps = steps_of(str(config.steps_given), samples, config.global_batch, tokens)
    if stored.steps_given == config.steps_given:
        folder.storage.write(CONFIG, freeze(dataclasses.replace(stored, steps=steps)).encode())
    return steps


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    new = with_steps_of(old, new)
    before, after = dict(leaves(plain(old))), dict(leaves(plain(new)))
    keys = sorted((before.keys() | after.keys()) - {"steps_given"})
    return [Change(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def changes_since(config: RunConfig, folder: RunFolder) -> list[Change]:
    """Return the changes against the run's config; ConfigError for a forbidden one once a step was done."""
    old = thaw(folder.storage.read(CONFIG))
    found = changes(old, config)
    return found if not found or folder.never_trained() else refuse_changes(old, config)


def attempt_config(folder: RunFolder, attempt: int) -> RunConfig | None:
    """Return the config that an attempt trained with; None if it never began to train."""
    try:
        return thaw(read_limited(folder.storage, folder.attempt(attempt, CONFIG), frozen_yaml.MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder.url}/{folder.attempt(attempt, CONFIG)}: {error}") from error


def refuse_changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Return all changes if each is allowed on resume; else ConfigError with the forbidden ones."""
    found = changes(old, new)
    refused = [change for change in found if not _is_free(change.key, new.resume.allow)]
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

    Every start calls this first: of two launchers one creates the file, and the config of the other is checked against
    it. As long as no step was done, the whole config may change.
    """
    text = freeze(config).encode()
    make_folder(folder.storage, config.access)
    if folder.storage.create(CONFIG, text):
        ensure_run_id(folder)
        return []
    config = with_requests_of(thaw(folder.storage.read(CONFIG)), config)
    found = changes_since(config, folder)
    if any(change.key.split(".")[0] == "exclude" for change in found):
        _refuse_rewriting(thaw(folder.storage.read(CONFIG)), config, folder.reached_step())
    if any(change.key == "access" for change in found):
        change_access(folder.storage, config.access)
    old = thaw(folder.storage.read(CONFIG))
    if found or old.steps_given != config.steps_given:
        folder.storage.write(CONFIG, freeze(with_steps_of(old, config)).encode())
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


def to_object(tree: Any, kind: type[T]) -> T:
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
    if config.steps == UNRESOLVED:
        converted["steps"] = config.steps_given
    return converted


def keys() -> list[str]:
    """Return every key of RunConfig, dotted."""
    return [key for key, _ in leaves(plain(RunConfig()))]
