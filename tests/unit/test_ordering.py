"""The order of the suite: files that share a server exist and stay together, forks come first, then what takes long."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from support import TESTS, ordering


@dataclass
class Item:
    nodeid: str
    forks: bool = False

    def get_closest_marker(self, name: str) -> str | None:
        return name if self.forks else None


def test_what_is_grouped_and_timed_is_there() -> None:
    files = [file for files in ordering.SHARED.values() for file in files]
    timed = json.loads(ordering.TABLE.read_text())
    assert [file for file in files if not (TESTS / f"{file}.py").exists()] == []
    assert [name for name in timed if not ordering.exists(name)] == []
    assert not set(files) & set(timed), "it is timed with its group"


def test_forks_come_first_then_the_longest_and_no_group_is_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "SHARED", {"server": ("b", "d")})
    items = [Item("tests/a.py::1"), Item("tests/b.py::1"), Item("tests/c.py::1"), Item("tests/c.py::2", forks=True),
             Item("tests/d.py::1"), Item("tests/e.py::1", forks=True)]  # fmt: skip
    ordering.sort(items, {"server": 90.0, "a": 5.0})  # type: ignore[arg-type]
    names = [item.nodeid.removeprefix("tests/").replace(".py::", "") for item in items]
    assert names == ["e1", "c2", "c1", "b1", "d1", "a1"]
