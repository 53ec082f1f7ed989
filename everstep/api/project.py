"""Code, data and config that `everstep.train` writes into a run folder, for the launcher to start."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from everstep.api.cell_source import MAIN, CellSource
from everstep.api.constructor import arguments_of, check_made_again, is_plain
from everstep.api.data_files import write_data
from everstep.config import Access
from everstep.config.dotted import leaves
from everstep.dataset.index import INDEX, TRAIN, VALIDATION
from everstep.errors import ConfigError
from everstep.run_folder import PROJECT, TASK_MODULE, RunFolder
from everstep.security.access import make_folder

MODULE = Path(TASK_MODULE).stem
EXPERIMENT = "train"
WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Code:
    """Definition of a task: its config node, the package to trust, and the text of our module."""

    node: dict[str, Any]
    plugin: str
    text: str = ""
    weights: Any = None
    """State dict that a model given as an object starts from."""


def task_code(task: Any) -> Code:
    """Return the code of a task: an instance, a class, or a function that returns one."""
    if isinstance(task, type | types.FunctionType):
        kind, given = task, {}
    else:
        kind, given = type(task), arguments_of(task, "task")
        again = kind(**given)
        check_made_again(task, again, "task")
        _refuse_other_values(task, again)
    missing = [
        m for m in ("model", "loss", "evaluate") if isinstance(kind, type) and not callable(getattr(kind, m, None))
    ]
    if missing:
        raise ConfigError(f"task: {kind.__name__} has no method {missing[0]!r}; for a plain module give loss=")
    if kind.__module__ != MAIN:
        return Code({"_target_": f"{kind.__module__}.{kind.__qualname__}", **given}, kind.__module__.partition(".")[0])
    source = CellSource()
    source.add(kind, "task")
    return Code({"_target_": f"{MODULE}.{kind.__name__}", **given}, MODULE, source.text())


def _refuse_other_values(task: object, again: object) -> None:
    """Raise ConfigError if a task holds arrays or weights that one made from the same arguments has not."""
    for key, value in vars(task).items():
        pairs = [(value, vars(again)[key])]
        if callable(getattr(value, "state_dict", None)):
            pairs = list(zip(value.state_dict().values(), vars(again)[key].state_dict().values(), strict=False))
        if any(hasattr(one, "__array__") and not np.array_equal(one, other) for one, other in pairs):
            raise ConfigError(
                f"task: {type(task).__name__}.{key} has values that the run would not have; give them as data, or load "
                "them in __init__ from a file whose name is an argument"
            )


def module_task_code(model: Any, loss: Any, inputs: list[str], target: str, metrics: Mapping[str, Any]) -> Code:
    """Return the code of a task for a module, or a function that makes one, and a loss function."""
    from torch import nn

    from everstep.api.module_code import module_code

    source = CellSource()
    weights = None
    if isinstance(model, nn.Module):
        expression = module_code(model, lambda kind: _use(source, kind, "model"))
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    elif callable(model):
        _use(source, model, "model")
        expression = f"{model.__name__}()"
    else:
        raise ConfigError(f"model is a {type(model).__name__}: give an nn.Module, or a function that returns one")
    measures = {name: _function(source, measure, name) for name, measure in {"loss": loss, **metrics}.items()}
    inner = ", ".join(f"{name!r}: {text}" for name, text in measures.items() if name != "loss")
    text = (
        f"import collections\n\nimport torch\n\nfrom everstep.tasks import Supervised\n{source.text()}\n\n"
        f"def build_model():\n    return {expression}\n\n\n"
        f"def build_task():\n"
        f"    return Supervised(build_model, {measures['loss']}, {inputs!r}, {target!r}, {{{inner}}})\n"
    )
    return Code({"_target_": f"{MODULE}.build_task"}, MODULE, text, weights)


def _use(source: CellSource, thing: Any, name: str) -> None:
    if thing.__module__ == MAIN:
        source.add(thing, name)
    else:
        source.add_import(thing)


def _function(source: CellSource, thing: Any, name: str) -> str:
    """Return an expression for a loss or metric."""
    from torch import nn

    from everstep.api.module_code import module_code

    if isinstance(thing, nn.Module):
        return module_code(thing, lambda kind: _use(source, kind, name))
    if not callable(thing) or not hasattr(thing, "__name__"):
        raise ConfigError(f"{name} is a {type(thing).__name__}: give a function of (output, target)")
    torchs = getattr(nn.functional, thing.__name__, None) is thing
    if torchs:
        return f"torch.nn.functional.{thing.__name__}"
    _use(source, thing, name)
    return str(thing.__name__)


class Project:
    """Folder of a run for what Python code has given: `run_task.py`, data, weights and a config."""

    def __init__(self, folder: RunFolder) -> None:
        root = folder.storage.path()
        if root is None:
            raise ConfigError(
                f"run_root={folder.url}: train() writes code and data beside the run, so run_root must be a folder; "
                "with a store use a package of your own and everstep run"
            )
        make_folder(folder.storage, Access.private)
        self._storage = folder.storage
        self.path = root.resolve() / PROJECT

    @property
    def exists(self) -> bool:
        return (self.path / "conf").exists()

    def write_code(self, code: Code) -> None:
        """Write the module; raise ConfigError if the run has another one already."""
        file = self.path.parent / TASK_MODULE
        if code.text:
            text = f'"""Code of this run, written by everstep.train."""\n\n{code.text}'
            if self.exists and (not file.exists() or file.read_text() != text):
                raise self._changed("the task, model or loss")
            self._storage.write(TASK_MODULE, text.encode())
        if code.weights is not None and not self.exists:
            import torch

            torch.save(code.weights, self.path / WEIGHTS)

    def write_data(self, data: Any, validation: Any, target: str | None) -> str:
        """Write the dataset and return its path; raise ConfigError if the run has another one already."""
        fraction = validation if isinstance(validation, int | float) else 0
        folder = self.path / "data"
        if not self.exists:
            if folder.exists():
                _remove(folder)  # what a start that was killed has left
            self._write_splits(data, validation, target, fraction, folder)
            return str(folder)
        again = self.path / ".data-again"
        try:
            self._write_splits(data, validation, target, fraction, again)
            if _digests(again) != _digests(folder):
                raise self._changed("the data")
        finally:
            _remove(again)
        return str(folder)

    @staticmethod
    def _write_splits(data: Any, validation: Any, target: str | None, fraction: float, folder: Path) -> None:
        if validation is None or fraction:
            write_data(data, str(folder), target, fraction)
        else:
            write_data(data, str(folder / TRAIN), target, 0)
            write_data(validation, str(folder / VALIDATION), target, 0)

    def write_config(self, code: Code, data: dict[str, Any], keys: Mapping[str, Any]) -> None:
        """Write conf/experiment/train.yaml; groups that are chosen by a name become Hydra's defaults."""
        from everstep.compose import groups

        known = groups()
        chosen = {key: value for key, value in keys.items() if key in known and isinstance(value, str)}
        config = {key: value for key, value in keys.items() if key not in chosen}
        for key, value in leaves(config):
            if not is_plain(value):
                raise ConfigError(
                    f"{key} is a {type(value).__name__}: values of keys are numbers, texts, lists and dicts"
                )
        defaults: list[dict[str, Any]] = [{f"override /{key}": value} for key, value in chosen.items()]
        if isinstance(optimizer := config.get("optimizer"), Mapping) and "_target_" in optimizer:
            # The arguments of the default optimizer are not those of this one.
            defaults.append({"override /optimizer": None})
        text = yaml.safe_dump(
            {"defaults": [*defaults, "_self_"], "task": code.node, "data": data, **config}, sort_keys=False
        )
        self._storage.write(f"{PROJECT}/conf/experiment/{EXPERIMENT}.yaml", f"# @package _global_\n{text}".encode())

    def _changed(self, what: str) -> ConfigError:
        run = self.path.parent
        return ConfigError(f"run={run.name}: {what} differs from what {run} was begun with; give another run=NAME")


def import_path(project: Path) -> str:
    """Return PYTHONPATH for the run: its project, and what this process finds its own modules by."""
    ours = (sys.prefix, sys.base_prefix)
    own = [str(Path(path or ".").resolve()) for path in sys.path if not path.startswith(ours) or not path]
    return ":".join(dict.fromkeys([str(project), *(path for path in own if Path(path).is_dir())]))


def _digests(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob(INDEX))]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
