"""Config errors of a command line: all of them, not only the first."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.compose import Composed, compose, groups
from everstep.errors import ConfigError
from everstep.launch.config import job_config


def composed_or_mistakes(
    overrides: Sequence[str], config_dirs: Sequence[str] = ()
) -> tuple[Composed | None, list[str]]:
    """Return the composition, or None and one line for each mistake."""
    try:
        composed = compose(overrides, config_dirs)
    except ConfigError as error:
        return None, _word_by_word(overrides, config_dirs) or [str(error)]
    found = _key_by_key(composed)
    return (None, found) if found else (composed, [])


def _word_by_word(overrides: Sequence[str], config_dirs: Sequence[str]) -> list[str]:
    """Compose argument by argument, group choices first, leaving out each that fails; return the errors."""
    nothing = _error([], config_dirs)
    chosen = set(groups())
    accepted: list[str] = []
    found: list[str] = []
    # Other overrides may be valid only with the experiment that they change.
    for word in sorted(
        overrides, key=lambda word: (word.split("=")[0] != "experiment", word.split("=")[0] not in chosen)
    ):
        error = _error([*accepted, word], config_dirs)
        if error is None or error == nothing:
            accepted.append(word)
        else:
            found.append(error)
    if _error(accepted, config_dirs) is None:
        found += _key_by_key(compose(accepted, config_dirs))
    return list(dict.fromkeys(found))


def _error(words: Sequence[str], config_dirs: Sequence[str]) -> str | None:
    try:
        compose(words, config_dirs)
    except ConfigError as error:
        return str(error)
    return None


def _key_by_key(composed: Composed) -> list[str]:
    """Return the errors of the job config: of each key alone, else of all together."""
    try:
        job_config(composed.job)
    except ConfigError as error:
        found = []
        for key, value in composed.job.items():
            try:
                job_config({key: value})
            except ConfigError as wrong:
                found.append(str(wrong))
        return list(dict.fromkeys(found)) or [str(error)]
    return []
