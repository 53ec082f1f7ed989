"""The verbs, and the argument parser of each, whose errors are one-line ConfigErrors."""

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


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at `--` into those of the verb and another program with its arguments."""
    words = list(arguments)
    if "--" not in words:
        return words, []
    at = words.index("--")
    if at + 1 == len(words):
        raise ConfigError("nothing stands after --: give a script with its arguments, or leave out the --")
    return words[:at], words[at + 1 :]


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
        from everstep.compose import groups
        from everstep.frozen_config import keys

        option = words[0].split("=")[0]
        key, known = option.lstrip("-").replace("-", "_"), [*keys(), *groups()]
        hint = f": write {key}=VALUE" if key in known else meant(key, known)
        return ConfigError(f"no option {option}; keys have no dashes{hint}") if hint else None


def add_overrides(parser: argparse.ArgumentParser, meaning: str = "what differs from conf/run.yaml") -> None:
    """Add key=value words and the folders of the user's own configs to a verb."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=meaning)
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="your own folder of configs")


VERBS = {
    "run": (
        "everstep.launch.cli.run",
        "run",
        "train here and now, on all devices of this machine; go on if the run exists",
    ),
    "submit": ("everstep.launch.cli.submit", "submit", "queue a run on a cluster; go on if the run exists"),
    "sweep": (
        "everstep.launch.cli.sweep",
        "sweep",
        "many runs: every one of several values, or what a sampler chooses",
    ),
    "leaderboard": ("everstep.launch.cli.leaderboard", "leaderboard", "the trials of a sweep, the best first"),
    "ls": ("everstep.launch.cli.ls", "ls", "all runs: state, step, rate, time left, where"),
    "status": ("everstep.launch.cli.status", "status", "where a run stands and why, and where its time went (goodput)"),
    "top": ("everstep.launch.cli.top", "top", "all runs, live in this terminal; open, cancel and resume them"),
    "ui": (
        "everstep.launch.cli.ui",
        "ui",
        "runs and reports in a browser of this machine; /metrics for Prometheus",
    ),
    "report": ("everstep.launch.cli.report", "report", "what happened in a run, as one HTML page for any browser"),
    "logs": ("everstep.launch.cli.logs", "logs", "what a rank wrote; -f follows across restarts"),
    "cancel": ("everstep.launch.cli.cancel", "cancel", "stop runs for good"),
    "resume": ("everstep.launch.cli.resume", "resume", "go on with a run as it was started, or with changes"),
    "evaluate": ("everstep.launch.cli.evaluate", "evaluate", "measure a checkpoint on a set, whole or by slices"),
    "predict": ("everstep.launch.cli.predict", "predict", "write a checkpoint's predictions as Parquet files"),
    "explain": ("everstep.launch.cli.explain", "explain", "attribute a checkpoint's outputs to the inputs of samples"),
    "export": ("everstep.launch.cli.export", "export", "write a checkpoint's model for other programs, and compare it"),
    "replay": ("everstep.launch.cli.replay", "replay", "train between two checkpoints again: is every bit the same?"),
    "evidence": ("everstep.launch.cli.evidence", "evidence", "all records of a run in one archive for an auditor"),
    "registry": (
        "everstep.launch.cli.registry",
        "registry",
        "versions of exported models, aliases, rollback; no server",
    ),
    "attach": ("everstep.launch.cli.attach", "attach", "look into a rank that is running: stacks, or a debugger"),
    "profile": ("everstep.launch.cli.profile", "profile", "profile the next steps of a run that is going"),
    "compare": ("everstep.launch.cli.compare", "compare", "what differs between two runs, and what each has reached"),
    "sync": ("everstep.launch.cli.sync", "sync", "write a run's metrics into W&B, TensorBoard, MLflow or trackio"),
    "checkpoint": ("", "", "ls, verify, diff, export, rm: what is saved, whether it is whole or the same"),
    "data": ("", "", "prepare, inspect, verify, tag, trace, exclude: datasets and their samples"),
    "check": ("everstep.launch.cli.check", "run", "all that can be known before a run starts"),
    "doctor": ("everstep.launch.cli.doctor", "doctor", "whether a cluster can take a job, and what hangs there"),
    "completion": ("everstep.launch.cli.completion", "completion", "print the completion script for bash, zsh or fish"),
}
"""Verb → module, function, help. Verbs without a module need torch and run in the trainer."""
