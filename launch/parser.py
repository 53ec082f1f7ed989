"""Argument parser of a verb. Its errors are one-line ConfigErrors with the nearest option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from everstep.config import meant
from everstep.errors import ConfigError, misread


def refuse_script(words: Sequence[str], verb: str) -> None:
    """Raise ConfigError when a script follows '--' for a verb that only runs the trainer."""
    if "--" in words:
        script = " ".join(words[words.index("--") + 1 :][:1]) or "SCRIPT"
        raise ConfigError(
            f"{verb} takes no script after '--': start it here with torchrun --nproc-per-node N {script}, or on a "
            f"cluster with everstep submit job=slurm … -- {script}"
        )


class Arguments(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        mistake = misread(message, options, f"{self.prog} --help")
        raise mistake if "did you mean" in str(mistake) else self._about_keys(message) or mistake

    def _about_keys(self, message: str) -> ConfigError | None:
        """Return an error that suggests steps=5 for --steps=5, for a verb that takes overrides."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        words = [word for word in unknown if word.startswith("-")]
        if not words or not any(action.dest == "overrides" for action in self._actions):
            return None
        from everstep.compose import groups, keys  # imported only after a mistake

        option = words[0].split("=")[0]
        key, known = option.lstrip("-").replace("-", "_"), [*keys(), *groups()]
        hint = f": write {key}=VALUE" if key in known else meant(key, known)
        return ConfigError(f"no option {option}; keys have no dashes{hint}") if hint else None
