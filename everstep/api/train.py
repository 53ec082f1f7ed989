"""`everstep.train`: a run from Python code, by the ordinary launcher in a process of its own."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from everstep.api.data_files import FEATURES, TARGET
from everstep.api.launcher import Launcher
from everstep.api.project import EXPERIMENT, WEIGHTS, Code, Project, import_path, module_task_code, task_code
from everstep.api.run import Run
from everstep.dataset.index import INDEX, TRAIN, ShardIndex
from everstep.errors import ConfigError
from everstep.launch.runs.lookup import ROOT
from everstep.run_folder import RunFolder
from everstep.storage import join_url, open_storage

if TYPE_CHECKING:
    from torch import nn


def train(
    task: Any = None,
    *,
    data: Any,
    validation: Any = None,
    model: Any = None,
    loss: Any = None,
    inputs: list[str] | None = None,
    target: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    steps: int | str | None = None,
    nproc: int | str = 1,
    run: str | None = None,
    run_root: str = ROOT,
    wait: bool = True,
    **keys: Any,
) -> Run:
    """Train here and now, as `everstep run` does, and return the run; this process is never forked.

    The code of the task or model, the data and the config are written to the run folder (`project/`), so the run can be
    resumed by `everstep resume`. With the `run` of an existing run it goes on from its newest checkpoint.

    Args:
        task: a task, its class, or a function that returns one; also one that a notebook cell defines. With `loss`,
            the same as `model`.
        data: a pair (features, target) of arrays or sparse matrices, a dict of arrays, a DataFrame, or a torch or
            Hugging Face dataset with a length.
        validation: the same, or the fraction of the data to hold out.
        model: in place of a task: a module, whose weights are the first ones, or a function that returns one.
        loss: of (output, target), for `model`: a mean over the samples or one value per sample.
        inputs: columns that `model` is called with; default `features`.
        target: the column of targets. Of a DataFrame with `model`, all other columns become `features`.
        metrics: further functions as `loss`, by name, for evaluations.
        steps: optimizer steps, epochs as "3ep", or tokens as "2e9tok".
        nproc: processes; "auto" is one for each GPU.
        wait: wait for the end and show progress; else return while it trains.
        keys: other keys of the config: `global_batch=64`, `parallel="fsdp"`, `optimizer={"lr": 1e-3}`.

    Raises:
        ConfigError: something cannot be written to the run, or a key does not exist; the message is one line.
        TrainingError: the run has failed.
    """
    if loss is not None and model is None:
        task, model = None, task
    code = _code(task, model, loss, inputs, target, metrics or {}, data)
    name = run or f"{_name_of(task if task is not None else model)}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder.of(run_root, name)
    project = Project(folder)
    project.write_code(code)
    path = project.write_data(data, validation, target if _is_table(model, inputs, data) else None)
    if code.weights is not None:
        keys.setdefault("init_from", str(project.path / WEIGHTS))
    if steps is not None:
        keys["steps"] = steps
    if validation is None:
        keys.setdefault("evaluate", {"every": None})
    project.write_config(code, {"_target_": "everstep.data.prepared", "path": path, "cast": _casts(path, keys)}, keys)
    found = import_path(project.path)
    words = ["run", "--config-dir", str(project.path / "conf"), f"experiment={EXPERIMENT}", f"run={name}"]
    words += [f"run_root={run_root}", f"plugins=[{code.plugin}]", f"job.nproc={nproc}", "log.progress=lines"]
    words += [f"job.env.PYTHONPATH='{found}'"]  # also for a resume
    started = Run.of(folder, Launcher(words, {**os.environ, "PYTHONPATH": found}), _factory(task, model))
    return started.wait() if wait else started


def _code(
    task: Any,
    model: Any,
    loss: Any,
    inputs: list[str] | None,
    target: str | None,
    metrics: Mapping[str, Any],
    data: Any,
) -> Code:
    if (task is None) == (model is None):
        raise ConfigError("train() takes a task, or model= and loss=; give one of the two")
    if task is not None:
        return task_code(task)
    if loss is None:
        raise ConfigError("train(model=…) also needs loss=, such as torch.nn.functional.cross_entropy")
    column = TARGET if target is None or _is_table(model, inputs, data) else target
    return module_task_code(model, loss, inputs or [FEATURES], column, metrics)


def _is_table(model: Any, inputs: list[str] | None, data: Any) -> bool:
    """True for a DataFrame whose columns become `features` and `target`."""
    return model is not None and inputs is None and hasattr(data, "columns")


def _casts(path: str, keys: Mapping[str, Any]) -> dict[str, str] | None:
    """Return float32 for columns of float64, which NumPy makes unasked, unless the run computes in it."""
    if keys.get("precision") == "fp64":
        return None
    storage = open_storage(path)
    index = ShardIndex.read(path if storage.exists(INDEX) else join_url(path, TRAIN))
    return {name: "float32" for name, column in index.columns.items() if column.type == "float64"} or None


def _name_of(thing: Any) -> str:
    return str(getattr(thing, "__name__", type(thing).__name__)).lower()


def _factory(task: Any, model: Any) -> Callable[[], nn.Module]:
    """Return what makes the model again in this process."""
    from torch import nn

    if isinstance(model, nn.Module):
        return lambda: copy.deepcopy(model)
    if model is not None:
        return model  # type: ignore[no-any-return]
    made = task() if isinstance(task, type) or not hasattr(task, "model") else task
    return made.model  # type: ignore[no-any-return]
