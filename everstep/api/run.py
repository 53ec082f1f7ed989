"""A run as Python sees it: its state, metrics and weights, and the launcher that trains it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from everstep.api.launcher import Launcher
from everstep.api.notebook import NotebookProgress, in_notebook
from everstep.errors import ConfigError, EverstepError
from everstep.launch.runs.lookup import ROOT, find
from everstep.run_folder import METRICS, RunFolder

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

STOPPED = 75
"""Exit code of the launcher for a run that was stopped and saved."""


class TrainingError(EverstepError):
    """A run that `everstep.train` waited for has failed; the message is the launcher's reason."""


class Run:
    """A run of this machine or in a store; `everstep.Run("first")` opens one that exists.

    Args:
        name: a name in `run_root`, a path or a URL.

    Raises:
        ConfigError: there is no such run.
    """

    def __init__(self, name: str, run_root: str = ROOT) -> None:
        self.folder: RunFolder = find(name, run_root)
        self._launcher: Launcher | None = None
        self._make_model: Callable[[], nn.Module] | None = None

    @classmethod
    def of(cls, folder: RunFolder, launcher: Launcher, make_model: Callable[[], nn.Module] | None) -> Run:
        """Return the run of a launcher that has just been started."""
        run = cls.__new__(cls)
        run.folder, run._launcher, run._make_model = folder, launcher, make_model
        return run

    def __repr__(self) -> str:
        return f"Run({self.folder.url!r}, {self.state}, step {self.step})"

    @property
    def name(self) -> str:
        return self.folder.url.rstrip("/").rpartition("/")[2]

    @property
    def is_running(self) -> bool:
        """True while the launcher that this object has started runs."""
        return self._launcher is not None and self._launcher.is_running

    @property
    def state(self) -> str:
        """The word of `everstep ls`: training, done, stopped, failed and so on."""
        from everstep.launch.runs.history import read
        from everstep.launch.runs.summary import summary

        return summary(read(self.folder)).standing.state.value

    @property
    def step(self) -> int:
        """Newest step with a record; 0 before the first."""
        return max((int(record["step"]) for record in self._records()), default=0)

    @property
    def metrics(self) -> pd.DataFrame:
        """Return the records by step, also while it trains; those of evaluations as `evaluate/…`.

        A step that was replayed after a restart is there once, with its last record.
        """
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for record in self._records():
            prefix = "" if record.get("kind") == "train" else f"{record.get('kind')}/"
            described = ("kind", "step", "unit", *(("time",) if prefix else ()))
            values = {f"{prefix}{k}": v for k, v in record.items() if k not in described}
            rows.setdefault(int(record["step"]), {}).update(values)
        frame = pd.DataFrame.from_dict(dict(sorted(rows.items())), orient="index")
        frame.index.name = "step"
        return frame

    @property
    def best(self) -> dict[str, Any] | None:
        """Return step, metric and value of the best evaluation; None before the first."""
        config = self._config()
        name, sign = config.evaluate.metric, 1 if config.evaluate.goal.value == "min" else -1
        found = {r["step"]: r[name] for r in self._records() if r.get("kind") == "evaluate" and name in r}
        if not found:
            return None
        step = min(found, key=lambda step: sign * found[step])
        return {"step": step, "metric": name, "value": found[step]}

    def model(self, which: str | int = "last") -> nn.Module:
        """Return the model with the weights of a checkpoint, on the CPU: `last`, `best` or a step."""
        from everstep.api.weights import trained_model

        return trained_model(self.folder, self._config(), which, self._make_model)

    def evaluate(
        self, which: str | int = "last", *, on: str = "validation", by: str = "", against: str = "", **keys: Any
    ) -> dict[str, Any]:
        """Measure a checkpoint on a whole set, as `everstep evaluate` does; return its record.

        Args:
            which: `last`, `best` or a step.
            on: validation, test, train, or the name of a set.
            by: a column; each of its values is measured as a slice.
            against: RUN or RUN@which of another run, measured on the same samples.
            keys: changes such as `data__path="…"`; two underscores stand for a dot.

        Raises:
            EverstepError: the launcher's reason.
        """
        words = ["evaluate", f"{self.folder.url}@{which}", "--json", "--on", on]
        words += [*(["--by", by] if by else []), *(["--against", against] if against else [])]
        launcher = Launcher([*words, *(f"{key.replace('__', '.')}={value}" for key, value in keys.items())])
        lines = list(launcher.lines())
        if launcher.wait() or "{" not in lines:
            said = [line for line in lines if "error: " in line or line.startswith("everstep: ")] or lines[-1:]
            raise EverstepError(said[-1].partition(": ")[2] if said else "everstep evaluate failed")
        found: dict[str, Any] = json.JSONDecoder().raw_decode("\n".join(lines[lines.index("{") :]))[0]
        return found

    def resume(self, *, wait: bool = True, **keys: Any) -> Run:
        """Go on from the newest checkpoint, with changes such as `steps=2000`; return the run."""
        words = [f"{key}={value}" for key, value in keys.items()]
        self._launcher = Launcher(["resume", self.folder.url, *words])
        return self.wait() if wait else self

    def stop(self) -> None:
        """Ask the run to save and stop, and wait until it has."""
        if self.is_running and self._launcher is not None:
            self._launcher.interrupt()
            self._launcher.wait()

    def wait(self) -> Run:
        """Wait for the end, showing progress; an interrupt (Ctrl-C, the stop button) saves and stops.

        Raises:
            ConfigError: this object has started nothing.
            TrainingError: the run has failed.
        """
        launcher = self._launcher
        if launcher is None:
            raise ConfigError(
                f"run {self.name} was not started by this object; everstep status {self.name} -f shows it"
            )
        progress, reason = NotebookProgress() if in_notebook() else None, ""
        while True:
            try:
                for line in launcher.lines():
                    reason = line if line.startswith("error: ") or not reason.startswith("error: ") else reason
                    progress.show(line) if progress is not None else print(line, flush=True)
                code = launcher.wait()
                break
            except KeyboardInterrupt:
                launcher.interrupt()
        if code not in (0, STOPPED):
            raise TrainingError(reason.partition(": ")[2] or f"the launcher ended with exit code {code}")
        return self

    def _config(self) -> Any:
        from everstep.frozen_config import thaw
        from everstep.run_folder import CONFIG

        return thaw(self.folder.storage.read(CONFIG))

    def _records(self) -> Iterator[dict[str, Any]]:
        for attempt in self.folder.attempts():
            yield from self.folder.lines(attempt, METRICS)
