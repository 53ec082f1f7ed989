"""Changes of a run's frozen config by a command line; nothing is composed anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.compose import conf_dir, groups
from everstep.config import OPEN_NODES, RunConfig, meant
from everstep.errors import ConfigError, nearest
from everstep.frozen_config import freeze, keys, plain, thaw
from everstep.security.config_trust import reason_for_distrust, refuse_code, without_environment
from everstep.security.secret_detection import refuse_secrets

KEPT_GROUPS = ("experiment", *OPEN_NODES)
"""Groups that define the run: another choice would make it another run."""
DEFINING_GROUPS = tuple(group for group in KEPT_GROUPS if group != "data")
"""Groups that define the model of a run, which may be tried on other data."""


def amend(
    config: RunConfig,
    job: dict[str, Any],
    overrides: Sequence[str],
    config_dirs: Sequence[str] = (),
    kept: Sequence[str] = KEPT_GROUPS,
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the typed config and job after the overrides; `settle` checks which keys may change.

    Args:
        kept: groups of which no other choice may be made.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = [Path(name).expanduser().resolve() for name in config_dirs]
    strange = [why for folder in folders if (why := reason_for_distrust(folder)) is not None]
    tree = OmegaConf.create({**plain(config), "job": job})
    options = groups(folders)
    for text in overrides:
        key, value = _parsed(text)
        try:
            if key in options and not isinstance(value, dict):
                chosen = _option(key, str(value), options, [conf_dir(), *folders], kept)
                if strange and key == "job":
                    _refuse_job(strange[0], chosen, str(value))
                # A choice replaces the whole group, as it does on the command line of `run`.
                OmegaConf.update(tree, key, chosen, merge=False)
            else:
                _check_key(key)
                if key == "steps":
                    tree["steps_given"] = None
                # A node of another target has other keys.
                OmegaConf.update(tree, key, value, merge=not (isinstance(value, dict) and "_target_" in value))
        except OmegaConfBaseException as error:
            raise ConfigError(f"cannot change {text!r}: {str(error).splitlines()[0]}") from error
    with without_environment(strange):
        plainly: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)  # type: ignore[assignment]
    refuse_secrets(plainly, "")
    changed_job = plainly.pop("job") or {}
    changed = thaw(OmegaConf.to_yaml(OmegaConf.create(plainly)))
    return thaw(freeze(changed)), changed_job


def _refuse_job(why: str, chosen: Any, name: str) -> None:
    """Raise ConfigError if the job of another user's config folder makes something run that ours does not."""
    from omegaconf import OmegaConf

    known = groups()
    ours = OmegaConf.to_container(_option("job", name, known, [conf_dir()])) if name in known["job"] else {}
    refuse_code(why, {"job": OmegaConf.to_container(chosen)}, {"job": ours})


def _parsed(text: str) -> tuple[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
        if override.is_sweep_override():
            raise ConfigError(f"{text!r} names several values: only 'everstep sweep' takes them")
        return override.key_or_group, override.value()
    except HydraException as error:
        raise ConfigError(f"cannot read {text!r}: {str(error).splitlines()[0]}; write key=value") from error


def _option(
    group: str, name: str, options: dict[str, list[str]], folders: Sequence[Path], kept: Sequence[str] = KEPT_GROUPS
) -> Any:
    from omegaconf import OmegaConf

    if group in kept:
        raise ConfigError(f"{group}={name}: a run that goes on keeps its {group}; start a new run with 'everstep run'")
    if name not in options[group]:
        there = ", ".join(options[group])
        raise ConfigError(f"{group}={name}: there is no such {group}{nearest(name, options[group])}; there are {there}")
    file = next(f for folder in reversed(folders) if (f := folder / group / f"{name}.yaml").is_file())
    return OmegaConf.load(file)


def _check_key(key: str) -> None:
    known = keys()
    if key.split(".")[0] in (*OPEN_NODES, "job") or key in known or any(each.startswith(f"{key}.") for each in known):
        return
    raise ConfigError(f"no key {key!r}{meant(key, known)}")
