"""Mutations of honest documents: most of their structure stays, so that they get past the first check."""

from __future__ import annotations

import copy
import json
import math
import os
from typing import Any

from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("EVERSTEP_FUZZ", "300"))
"""Of each fuzzer; `make fuzz` gives more, and other ones every time."""

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 5, 0.5, 1.0, -0.0, 2**31, 2**32, 2**47, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 1e308]
)
ODD = st.sampled_from(
    [
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 300,
    ]
)
LEAVES = NUMBERS | ODD | st.text(max_size=5) | st.integers() | st.floats()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a tree, its root included."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in children for place in places(value, (*path, key)))]


@st.composite
def trees(draw: st.DrawFn, honest: Any) -> Any:
    """A copy of a document with up to four values replaced, removed, renamed or doubled."""
    tree = copy.deepcopy(honest)
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["value", "value", "value", "remove", "more", "copy"]))
        if what == "value":
            parent[path[-1]] = draw(VALUES)
        elif what == "remove":
            del parent[path[-1]]
        elif what == "more" and isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = copy.deepcopy(parent[path[-1]])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(draw(st.sampled_from(list(parent.values()))))
    return tree


@st.composite
def contents(draw: st.DrawFn, honest: bytes) -> bytes:
    """Bytes with some changed, cut, doubled or put in."""
    data = bytearray(honest)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["set", "set", "word", "cut", "put", "brackets"]))
        if what == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "word":
            word = draw(st.sampled_from([0, 1, 16, 2**31, 2**62, 2**63 - 1, -1, -(2**63), -4096]))
            data[at : at + 8] = word.to_bytes(8, "little", signed=True)
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "put":
            data[at:at] = draw(st.binary(max_size=20))
        elif what == "brackets":
            data[at:at] = draw(st.sampled_from([b"[", b"{", b"&a ", b"*a ", b"9", b" !!x "])) * draw(
                st.sampled_from([1, 70, 3000])
            )
    return bytes(data)


def documents(honest: Any) -> st.SearchStrategy[bytes]:
    """The JSON of a mutated tree, or the mutated bytes of the honest JSON."""
    return trees(honest).map(lambda tree: json.dumps(tree).encode()) | contents(json.dumps(honest).encode())


def check_one_line(refused: Exception) -> None:
    """Check that an error is what a user can read."""
    assert len(str(refused).splitlines()) == 1
    assert len(str(refused)) < 6000
