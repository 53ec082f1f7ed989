"""The surface that users see: every config key, verb and public name, listed, so that a new one is a decision."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import everstep
from everstep.dataset.prepare.options import PrepareOptions
from everstep.frozen_config import keys
from everstep.launch.config import JobConfig
from everstep.launch.parser import VERBS
from everstep.launch.sweep.config import SweepConfig

GOLDEN = Path(__file__).parent.parent / "golden/surface.txt"
PUBLIC = ("everstep", "everstep.tasks", "everstep.models", "everstep.data", "everstep.sinks")


def fields(config: Any, prefix: str) -> list[str]:
    """The keys of a dataclass and of those that are types of its fields."""
    found, types = [], get_type_hints(config)
    for field in dataclasses.fields(config):
        inner = types[field.name]
        name = f"{prefix}{field.name}"
        found += fields(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return found


def test_the_surface_is_what_was_decided() -> None:
    found = [
        *(f"run key {key}" for key in sorted(keys())),
        *(f"job key {key}" for key in sorted(fields(JobConfig, "job."))),
        *(f"sweep key {key}" for key in sorted(fields(SweepConfig, "sweep."))),
        *(f"prepare key {key}" for key in sorted(fields(PrepareOptions, ""))),
        *(f"verb {verb}" for verb in VERBS),
        *(f"name {module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__),
    ]
    text = "".join(f"{line}\n" for line in found)
    if os.environ.get("EVERSTEP_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_can_be_imported(module: str) -> None:
    package = importlib.import_module(module)
    assert set(package.__all__) <= set(dir(package))  # Tab shows them
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = package.Nothing


def test_the_package_has_a_version() -> None:
    assert everstep.__version__
