"""The command line of a verb, whose mistakes are errors like all others: one line, with what was probably meant."""

from __future__ import annotations

import argparse
from typing import NoReturn

from trainer.errors import misread


class Arguments(argparse.ArgumentParser):
    """As argparse has it, but that it raises ConfigError and does not print its usage."""

    def error(self, message: str) -> NoReturn:
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        raise misread(message, options, f"{self.prog} --help")
