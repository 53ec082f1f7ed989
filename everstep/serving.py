"""Models of a registry in a program that serves them: verified before they are parsed, swapped whole."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.errors import ConfigError, EverstepError
from everstep.registry.records import Version
from everstep.registry.registry import Registry

LOG = logging.getLogger("everstep")
GRAPHS = ("pt2", "torchscript", "onnx")
"""Formats that run without the model's code."""


@dataclass(frozen=True)
class _Loaded:
    version: Version
    call: Callable[..., Any]


class ServedModel:
    """A model that is called as the exported one; one version answers a call as a whole.

    Args:
        registry: the models.
        name: MODEL, MODEL@7 or MODEL@prod.
        warm_up: positional arguments of a call that a new version must answer before it is used; None calls it with
            zeros in the shapes that the export has recorded.
    """

    def __init__(self, registry: Registry, name: str, warm_up: Sequence[Any] | None = None) -> None:
        self.registry = registry
        self.name = name
        self.error: str | None = None
        """Reason why the last look for a new version failed; None if it did not."""
        self._warm_up = warm_up
        self._current = self._load(registry.find(name))
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def version(self) -> Version:
        """The version that answers now."""
        return self._current.version

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._current.call(*args, **kwargs)

    def refresh(self) -> bool:
        """Load the version that the name points to now, if it is another one; True if it was swapped.

        Raises:
            EverstepError: the new version is damaged or does not answer; the old one goes on.
        """
        version = self.registry.find(self.name)
        if version.number == self.version.number:
            return False
        self._current = self._load(version)  # one assignment: a call sees the old version or the new one
        return True

    def watch(self, every_s: float) -> ServedModel:
        """Look for a new version every so many seconds, on a thread; if that fails, the old one goes on."""
        if not every_s > 0:
            raise ConfigError(f"every_s={every_s}: must be > 0")
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, args=(every_s,), daemon=True, name="everstep-serving")
            self._watcher.start()
        return self

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                self.refresh()
                self.error = None
            except Exception as error:  # a store that is away, a file that is no model: the old one goes on
                if self.error is None:
                    LOG.warning("%s stays at version %d: %s", self.name, self.version.number, error)
                self.error = f"{type(error).__name__}: {error}"

    def _load(self, version: Version) -> _Loaded:
        form, file = str(version.facts.get("format")), str(version.facts.get("file"))
        if form not in GRAPHS or file not in version.files:
            raise ConfigError(
                f"{version} is of format {form}, which needs the model's code; export it as {', '.join(GRAPHS)}"
            )
        with tempfile.TemporaryDirectory(prefix="everstep-serving-") as folder:
            fetched = self.registry.fetch(version, Path(folder) / "model")
            try:
                call = _LOADERS[form](fetched / file)
                _warm_up(call, self._warm_up, version.facts.get("inputs"))
            except Exception as error:
                said = " ".join(str(error).split())[:300]
                raise EverstepError(
                    f"{version} does not answer a warm-up call: {type(error).__name__}: {said}"
                ) from error
        return _Loaded(version, call)


def load(
    url: str,
    model: str,
    *,
    alias: str | None = None,
    version: int | None = None,
    warm_up: Sequence[Any] | None = None,
    every_s: float | None = None,
    trusted: str | Sequence[str] | None = None,
) -> ServedModel:
    """Return a model of a registry, ready to be called.

    Args:
        url: the registry.
        alias: an alias, such as `prod`; without alias and version the newest version.
        version: a fixed version.
        warm_up: positional arguments of a call that each version must answer before it is used.
        every_s: look for a new version every so many seconds, on a thread.
        trusted: public keys (`ed25519-public:…`), of which one must have signed each record; without it the key in
            EVERSTEP_SIGNING_KEY must, if it is set.

    Raises:
        ConfigError: there is no such model, it has weights only, or `trusted` has no public key.
        DataError: a record is not signed as it must be, or a file is not the one that was added.
    """
    if alias is not None and version is not None:
        raise ConfigError(f"alias={alias!r}, version={version}: give one of them")
    which = alias if alias is not None else version
    served = ServedModel(Registry(url, trusted), model if which is None else f"{model}@{which}", warm_up)
    return served if every_s is None else served.watch(every_s)


def _program(file: Path) -> Callable[..., Any]:
    import torch

    module = torch.export.load(file).module()

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    return call


def _trace(file: Path) -> Callable[..., Any]:
    import torch

    module = torch.jit.load(str(file), map_location="cpu")  # type: ignore[no-untyped-call]

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    return call


def _graph(file: Path) -> Callable[..., Any]:
    """Return an ONNX graph as a function of arrays or tensors, in the order of its inputs."""
    import importlib

    import numpy as np

    session = importlib.import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = session.run(None, {name: np.asarray(value) for name, value in given.items()})
        return found[0] if len(found) == 1 else found

    return call


_LOADERS = {"pt2": _program, "torchscript": _trace, "onnx": _graph}


def _warm_up(call: Callable[..., Any], given: Sequence[Any] | None, inputs: object) -> None:
    """Call a new version once: with the caller's arguments, or zeros as the export describes them."""
    if given is not None:
        call(*given)
    elif isinstance(inputs, Mapping):
        import torch

        def zeros(described: Mapping[str, Any]) -> Any:
            shape = [2 if size is None else int(size) for size in described["shape"]]
            return torch.zeros(shape, dtype=getattr(torch, str(described["dtype"])))

        call(*(zeros(each) for each in inputs["args"]), **{n: zeros(each) for n, each in inputs["kwargs"].items()})
