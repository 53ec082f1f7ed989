"""The keys of a sweep as they are given: on the command line, and in a file of conf/sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from everstep.errors import ConfigError, nearest
from everstep.launch.sweep.config import SweepConfig, sweep_config
from everstep.security.config_trust import reason_for_distrust


def given_sweep(words: Sequence[str], files: Mapping[str, Path]) -> SweepConfig:
    """Return the sweep of the words sweep=NAME and sweep.KEY=VALUE; `files` are those by name."""
    node: dict[str, Any] = {}
    for word in sorted(words, key=lambda word: not word.startswith("sweep=")):
        key, _, _ = word.partition("=")
        value = value_of(word)
        if key == "sweep":
            if value not in files:
                known = f"; there are {', '.join(sorted(files))}" if files else ""
                raise ConfigError(f"sweep={value}: there is no such sweep{nearest(str(value), files) or known}")
            node |= _sweep_of(files[str(value)])
        else:
            node[key.removeprefix("sweep.")] = value
    return sweep_config(node)


def _sweep_of(file: Path) -> dict[str, Any]:
    """Return the keys of a file in conf/sweep; its values are composed later, trial by trial."""
    text = file.read_text()
    if "${" in text and (why := reason_for_distrust(file.parent.parent)) is not None:
        raise ConfigError(f"--config-dir={why}, so {file} may hold no ${{…}}; use a copy of your own")
    found: dict[str, Any] = yaml.safe_load(text) or {}
    return found


def value_of(word: str) -> Any:
    """Return the value of key=value, by the grammar of Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        value = override.value()
        # `sweep.metric=accuracy,size` names both metrics: keys of the sweep itself are not swept.
        return list(value.list) if isinstance(value, ChoiceSweep) else value
    except HydraException as error:
        raise ConfigError(f"cannot read {word!r}: {str(error).splitlines()[0]}; write key=value") from error
