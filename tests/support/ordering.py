"""Distribution of tests over workers: those that share a server on one worker, the longest first.

A file stays together, and so do all that share a server that takes long to start. Groups with forked ranks go first: a
fork is safe only while no test has left threads or a mesh of its own in this process. Then the longest go first, as
durations.json says; `make test ARGS=--store-durations` writes it anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support import TESTS

TABLE = TESTS / "durations.json"
BRIEF_S = 3.0
"""Files that take less are not in the table."""
SHARED = {
    "slurm": ("cluster/test_slurm_submit", "cluster/test_slurm_sweep", "cluster/test_slurm_faults",
              "cluster/test_slurm_ends", "cluster/test_slurm_names"),
    "stores": ("contract/test_google_xml_server", "contract/test_credentials", "contract/test_storage",
               "faults/test_store_faults", "faults/test_fault_proxy", "faults/test_shared_cache"),
}  # fmt: skip
"""Group → its files. Those that ask one of the stores for a test or two, and fork ranks besides, are in none."""


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0].removeprefix(f"{TESTS.name}/").removesuffix(".py")
    return next((name for name, files in SHARED.items() if file in files), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Not by --dist=loadgroup, which adds the group to each name of a test: nobody could copy that to run it again."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sort(items, json.loads(TABLE.read_text()))


def sort(items: list[pytest.Item], known: dict[str, float]) -> None:
    """`known`: seconds that groups take."""
    forks: dict[str, set[bool]] = {}
    for item in items:
        forks.setdefault(group_of(item.nodeid), set()).add(item.get_closest_marker("dist") is not None)
    order = sorted(forks, key=lambda name: (_phase(forks[name]), -known.get(name, 0.0)))
    places = {name: place for place, name in enumerate(order)}
    items.sort(key=lambda item: (places[group_of(item.nodeid)], item.get_closest_marker("dist") is None))


def _phase(forks: set[bool]) -> int:
    """Those that do nothing but fork; those that also do; those that do not."""
    return {frozenset([True]): 0, frozenset([True, False]): 1, frozenset([False]): 2}[frozenset(forks)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store-durations", action="store_true", help=f"after a whole run: what each group took, to {TABLE.name}"
    )


class Durations:
    """Sums up what each group takes, and keeps what is known of others."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        group = group_of(report.nodeid)
        self.seconds[group] = self.seconds.get(group, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        before = json.loads(TABLE.read_text())
        found = {**before, **{name: round(seconds) for name, seconds in self.seconds.items()}}
        kept = {name: seconds for name, seconds in found.items() if seconds >= BRIEF_S and exists(name)}
        TABLE.write_text(json.dumps(dict(sorted(kept.items(), key=lambda item: -item[1])), indent=0) + "\n")


def exists(group: str) -> bool:
    return group in SHARED or Path(TESTS / f"{group}.py").exists()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("store_durations", False) and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Durations())
