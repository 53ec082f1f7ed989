"""Trust in config folders (--config-dir): those of other users run only what the command line names.

A folder of configs is code like any Python package: it names packages to import and shell lines to run. A folder that
only this user can write is trusted like the command line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from everstep.config.dotted import leaves
from everstep.errors import ConfigError
from everstep.security.ownership import other_writer

CODE_KEYS = (
    "env", "setup", "flags", "python", "image", "runtime", "mounts", "interface", "causes", "k8s", "secrets",
    "notify",
)  # fmt: skip
"""Keys of a job that choose or change the programs that run; the others are counts, limits and names."""
SHOWN = 60
"""Characters of a value that a refusal shows."""


def reason_for_distrust(folder: Path) -> str | None:
    """Return `FOLDER: reason` if other users can change a folder of configs; None if only this user can."""
    for above, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        configs = [name for name in files if name.endswith((".yaml", ".yml"))]
        for path in (Path(above), *(Path(above, name) for name in (*folders, *configs))):
            with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                if path.is_symlink() and path.is_dir():
                    return f"{folder}: {path} is a link to another folder"
                if why := other_writer(path.stat(), owners=(0,)):
                    return f"{folder}: {path} {why}"
    return None


def refuse_code(why: str, used: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raise ConfigError if a config makes something run that the command line by itself does not.

    Args:
        why: result of `reason_for_distrust`.
        used: the composed `plugins` and `job`.
        said: `plugins` and `job` as composed from the command line and this user's own configs.
    """
    named = [name for name in used.get("plugins") or () if name not in (said.get("plugins") or ())]
    ours = dict(leaves(said.get("job") or {}))
    found = [f"plugins=[{','.join(named)}]"] if named else []
    found += [
        f"job.{key}={str(value)[:SHOWN]}"
        for key, value in leaves(used.get("job") or {})
        if key.split(".")[0] in CODE_KEYS and ours.get(key) != value and value not in (None, [], {})
    ]
    if found:
        raise ConfigError(
            f"--config-dir={why}, and it would run {'; '.join(found)}; say these on the command line if you trust "
            "them, or use a copy of your own"
        )


@contextlib.contextmanager
def without_environment(why: Sequence[str]) -> Iterator[None]:
    """Refuse ${oc.env:NAME} in this block if `why` has a reason: such a config could send a secret away."""
    if not why:
        yield
        return
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    def refuse(name: str, *_: Any) -> None:
        raise ConfigError(f"--config-dir={why[0]}, so no config may read ${name}; give its value on the command line")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
