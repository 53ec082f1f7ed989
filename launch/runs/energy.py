"""Energy that the GPUs of a run have used, from the last records of the figures of its nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from everstep.checked_json import mapping, number, parse
from everstep.launch.runs.history import READERS, History
from everstep.launch.runs.record_types import one_line
from everstep.run_folder import NODES, RunFolder
from everstep.storage import start_of_last

JOULES_PER_KWH = 3.6e6
LAST_RECORDS = 2
"""Records at the end of a file that are read: a kill may have cut the last one."""


def energy_kwh(folder: RunFolder, history: History) -> float | None:
    """Return the energy of all attempts and nodes; None if no GPU has told its power.

    Each node's last record has the integral over its attempt.
    """
    with ThreadPoolExecutor(READERS) as pool, one_line(folder):
        newest = [
            path for paths in pool.map(lambda each: _newest(folder, each.number), history.attempts) for path in paths
        ]
        used = [joules for joules in pool.map(lambda path: _joules(folder, path), newest) if joules is not None]
    return sum(used) / JOULES_PER_KWH if used else None


def _newest(folder: RunFolder, attempt: int) -> list[str]:
    """Return the file of each node, or its newest part on a store."""
    where = folder.attempt(attempt, NODES)
    newest = {name.split(".")[0].split("-")[0]: name for name in folder.storage.names(where)}  # sorted by name
    return [f"{where}/{name}" for name in newest.values()]


def _joules(folder: RunFolder, path: str) -> float | None:
    """Return the last known energy of a node's attempt."""
    start, end = start_of_last(folder.storage, path, LAST_RECORDS), folder.storage.size(path)
    found = None
    for line in bytes(folder.storage.read_range(path, start, end)).splitlines():
        try:
            value = mapping(parse(line), path).get("energy_j")
        except ValueError:
            continue
        found = found if value is None else number(value, f"{path}: energy_j", 0)
    return found
