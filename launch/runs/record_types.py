"""Types of a run folder's records: a damaged one must not break the list of all runs.

Each function returns a record whose known fields are checked; unknown ones are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from everstep.checked_json import LATEST, mapping, number, sequence, text, whole
from everstep.errors import DataError, EverstepError, printable
from everstep.run_folder import RunFolder

Record = dict[str, Any]
Check = Callable[[object, str], object]
LONGEST = 10_000
"""Limit of a reason or a program's argument, in characters."""
MOST = 1 << 16
"""Limit of the number of hosts, arguments or metrics."""


class RecordError(DataError):
    """A record of a run folder that everstep cannot have written."""


def _seconds(value: object, place: str) -> object:
    """Check a time since the epoch, a duration or a rate."""
    return number(value, place, 0, LATEST)


def _measured(value: object, place: str) -> object:
    """Check a measurement, which may be NaN or infinite."""
    return value if type(value) is float else number(value, place)


def _long(value: object, place: str) -> object:
    return text(value, place, LONGEST)


def _texts(value: object, place: str) -> object:
    return [text(each, place, LONGEST) for each in sequence(value, place, MOST)]


def _metrics(value: object, place: str) -> object:
    return {text(name, place): _measured(each, place) for name, each in mapping(value, place, MOST).items()}


def _flag(value: object, place: str) -> object:
    if type(value) is not bool:
        raise ValueError(f"{place} is not true or false")
    return value


CLAIM: dict[str, Check] = {"time": _seconds, "began": _seconds, "host": text, "pid": whole, "world": whole}
SUBMITTED: dict[str, Check] = {"time": _seconds, "scheduler": text, "token": text, "argv": _texts, "code": text}
SETTLED: dict[str, Check] = {"handle": text}
START: dict[str, Check] = {"time": _seconds, "hosts": _texts}
DECISION: dict[str, Check] = {"time": _seconds, "outcome": text, "go_on": _flag, "reason": _long}
PROGRESS: dict[str, Check] = {
    **dict.fromkeys(("step", "steps"), whole),
    **dict.fromkeys(("time", "eta_s", "next_s", "steps_per_s"), _seconds),
    "loss": _measured,
    "metrics": _metrics,
    "metric": text,
    "straggler": _long,
}


def typed(record: Mapping[str, Any], kinds: Mapping[str, Check], place: str) -> Record:
    """Return the record; a field that is null counts as missing.

    Raises:
        ValueError: a field is of another type or out of range.
    """
    for key, check in kinds.items():
        if record.get(key) is not None:
            check(record[key], f"{place}: {key}")
    return dict(record)


@contextmanager
def one_line(folder: RunFolder) -> Iterator[None]:
    """Turn any error about the records of a run into one line with its folder."""
    try:
        yield
    except EverstepError:
        raise
    except Exception as error:
        why = " ".join(printable(str(error)).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RecordError(f"{folder.url}: its records are not what everstep writes ({kind}{why})") from error
