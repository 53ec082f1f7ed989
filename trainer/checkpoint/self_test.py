"""Self-test, once per run: model and optimizer must be restored from a checkpoint as they were saved.

A second copy is made by the same factories, at first without memory, so that it costs no initialisation. The first
checkpoint is read into the copy, and the state that the copy would save is compared with the checkpoint bit by bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp

from everstep.errors import ConfigError, EverstepError
from everstep.fault import fault_of, reason_of
from everstep.outcome import Fault
from everstep.run_folder import MANIFEST
from everstep.storage import Storage
from everstep.trainer.checkpoint.manifest import Manifest
from everstep.trainer.checkpoint.read import OpenCheckpoint, fill
from everstep.trainer.checkpoint.tensor_index import read_metadata
from everstep.trainer.optim import local
from everstep.trainer.state.train_state import Packed, TrainState

LOG = logging.getLogger("everstep")
OFF = "checkpoint.self_test=false trains all the same"


@dataclass
class SelfTest:
    """A second copy of a run's state, ready to be filled."""

    copy: TrainState

    def read_back(self, source: OpenCheckpoint, rank: int) -> None:
        """Read a checkpoint into the copy and compare.

        Raises:
            ConfigError: a part is not restored as it was saved; the message names it.
        """
        with torch.no_grad():
            values = _own(source.manifest.values)
            with _refused():
                targets = self.copy.prepare(source.metadata, values)
            raw = {name: torch.empty_like(tensor) for name, tensor in targets.items()}
            fill(raw, source, rank)
            with _refused():
                _fill_from(targets, raw)
                self.copy.load(values)
            self._compare(Packed(raw, values))

    def round_trip(self, packed: Packed) -> None:
        """Load a packed state into the copy and compare, as `read_back` does with a checkpoint."""
        values = _own(json.loads(json.dumps(packed.values)))
        with torch.no_grad():
            with _refused():
                targets = put_into(self.copy, Packed(packed.tensors, values))
            self._compare(Packed({name: packed.tensors[name].detach() for name in targets}, values))

    def _compare(self, saved: Packed) -> None:
        with _refused():
            again = self.copy.pack()
        for name, tensor in saved.tensors.items():
            if name not in again.tensors or not equal(tensor, again.tensors[name]):
                raise ConfigError(f"self-test: {name} does not come back from a checkpoint as it was saved; {OFF}")
        if more := sorted(again.tensors.keys() - saved.tensors.keys()):
            raise ConfigError(f"self-test: {more[0]} comes back from a checkpoint that has none; {OFF}")
        for part in ("model", "optimizer", "attributes"):
            differing = first_difference(saved.values.get(part), again.values.get(part), part)
            if differing is not None:
                raise ConfigError(f"self-test: {differing} does not come back from a checkpoint as it was saved; {OFF}")


def put_into(state: TrainState, packed: Packed) -> Iterable[str]:
    """Load a packed state into another one, as a restore does; return the names of its tensors."""
    metadata = dcp.Metadata({name: _entry(tensor) for name, tensor in packed.tensors.items()})
    targets = state.prepare(metadata, packed.values)
    _fill_from(targets, packed.tensors)
    state.load(packed.values)
    return targets.keys()


def _fill_from(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        local(target.detach()).copy_(local(saved[name].detach()))


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turn an error of loading the copy into a ConfigError, except a fault of the machine.

    A fault of the machine is, for instance, a lack of memory.
    """
    try:
        yield
    except Exception as error:
        if fault_of(error) is Fault.machine:
            raise
        said = str(error) if isinstance(error, EverstepError) else reason_of(error)
        raise ConfigError(f"self-test: the state cannot be read back: {said}; {OFF}") from error


class FirstCheckpoint:
    """Reads the first checkpoint of a run back, in the thread that has written it."""

    def __init__(self, make: Callable[[], SelfTest] | None) -> None:
        self._make = make
        """Factory of the second copy; None when the test is done, or is switched off."""
        self._error: ConfigError | None = None

    def of(self, storage: Storage, path: str, rank: int) -> Callable[[], None] | None:
        """Make the second copy; return the function that reads this checkpoint back, or None without a test.

        The copy is made in the training thread, since its initialisation draws random numbers.
        """
        if self._make is None:
            return None
        test = self._make()

        def read_back() -> None:
            try:
                manifest = Manifest.from_json(storage.read(f"{path}/{MANIFEST}"))
                test.read_back(OpenCheckpoint(storage, path, read_metadata(storage, path), manifest), rank)
                self._make = None
            except ConfigError as error:
                self._error = error
            except Exception as error:  # such as a store that does not answer: the next checkpoint is tested
                LOG.warning("the self-test could not read %s: %s: %s", path, type(error).__name__, error)

        return read_back

    def check(self) -> None:
        """Raise, in the training thread, the error that the test has found."""
        if self._error is not None:
            raise self._error


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of model and optimizer; there is no second copy of the task and the hooks."""
    attributes = {n: v for n, v in values.get("attributes", {}).items() if n.startswith(("model.", "optimizer."))}
    own: dict[str, Any] = {part: values[part] for part in ("model", "optimizer") if part in values}
    return own | ({"attributes": attributes} if attributes else {})


def first_difference(one: Any, other: Any, name: str) -> str | None:
    """Return the path of the first value in which two packed states differ; None if they are equal.

    They are compared as JSON, in which NaN equals itself.
    """
    if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        found = (first_difference(one.get(key), other.get(key), f"{name}.{key}") for key in [*one, *other])
        return next((path for path in found if path is not None), name)
    return name


def _entry(tensor: Tensor) -> dcp.TensorStorageMetadata:
    return dcp.TensorStorageMetadata(dcp.TensorProperties(tensor.dtype), tensor.shape, [])


def equal(one: Tensor, other: Tensor) -> bool:
    """True if two tensors, on any devices, are equal to the last bit."""
    one, other = local(one.detach()), local(other.detach())
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
