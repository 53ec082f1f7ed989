"""Schema of our keys for Hydra, and its own groups. Imports Hydra, so `compose` imports it late."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import hydra.conf  # noqa: F401  it stores Hydra's own keys
from hydra.core.config_store import ConfigStore

from everstep.config import Node, RunConfig

HYDRAS_GROUPS = (
    "output",
    "launcher",
    "sweeper",
    "help",
    "hydra_help",
    "hydra_logging",
    "job_logging",
    "callbacks",
    "env",
)


@dataclass(kw_only=True)
class Composition(RunConfig):
    """Composition of one command line: the run, and under `job` the launcher's part."""

    job: Node | None = None


@functools.cache
def register() -> None:
    """Register the schema, once per process, as it takes some milliseconds.

    Hydra's own keys are discarded after composing, and reading the files of its groups would be a third of the work.
    The groups exist, with nothing chosen, so that a user's file that overrides one of them still composes.
    """
    store = ConfigStore.instance()
    store.repo["hydra"]["config.yaml"].node.defaults = [{group: None} for group in HYDRAS_GROUPS]
    store.store(name="run_schema", node=Composition)
