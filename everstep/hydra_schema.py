"""What Hydra is told of our keys, and of its own. It imports Hydra, so `compose` imports it late."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import hydra.conf  # noqa: F401  it stores Hydra's own keys
from hydra.core.config_store import ConfigStore

from everstep.config import Node, RunConfig

HYDRAS_GROUPS = ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "callbacks",
                 "env")  # fmt: skip


@dataclass(kw_only=True)
class Composition(RunConfig):
    """What one command line says: the run, and under `job` the launcher's part."""

    job: Node | None = None


@functools.cache
def register() -> None:
    """Once in a process, for it takes some milliseconds.

    Hydra's own keys are thrown away when it has composed, and reading the files of its groups would be a third of the
    work. The groups are there, with nothing chosen, so that a user's file which overrides one of them still composes.
    """
    store = ConfigStore.instance()
    store.repo["hydra"]["config.yaml"].node.defaults = [{group: None} for group in HYDRAS_GROUPS]
    store.store(name="run_schema", node=Composition)
