"""Nested state of other people's objects goes to JSON and named tensors, and comes back as it was."""

from __future__ import annotations

import io
import json
import math
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import CheckpointError
from everstep.trainer.state.state_tree import pack, unpack

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
NAMES = st.text(st.characters(exclude_characters=".$"))
"""Without dots: bytes go to the checkpoint under the path of their names."""
KEYS = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4)
            | st.tuples(inner, inner) | st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5))
        ),
        max_leaves=12,
    )  # fmt: skip


def through_json(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(value, "x", tensors)))
    return unpack(packed, {name: tensor.clone() for name, tensor in tensors.items()})


@given(trees(LEAVES))
def test_plain_trees_come_back_as_they_were(value: Any) -> None:
    again = through_json(value)
    assert again == value
    assert type(again) is type(value)


@given(st.dictionaries(KEYS, LEAVES.filter(lambda leaf: not isinstance(leaf, bytes)), max_size=5))
def test_keys_keep_their_types(value: dict[Any, Any]) -> None:
    again = through_json(value)
    assert list(map(repr, again.items())) == list(map(repr, value.items()))


@pytest.mark.parametrize("value", [
    {"$": "tensor", "tensor": "elsewhere"}, OrderedDict(b=1, a=2), {1, 2}, frozenset({3}), 1 + 2j, torch.bfloat16,
    torch.Size([2, 3]), -0.0, 2**100, bytearray(b"ab"), torch.device("cpu"),
])  # fmt: skip
def test_special_values_come_back_with_their_type(value: Any) -> None:
    again = through_json({"v": value})["v"]
    assert (again, type(again)) == (value, type(value))
    assert repr(again) == repr(value)


def test_numbers_that_json_has_not_come_back() -> None:
    again = through_json([math.inf, -math.inf, math.nan])
    assert again[:2] == [math.inf, -math.inf]
    assert math.isnan(again[2])


def test_tensors_arrays_and_files_come_back_to_the_bit() -> None:
    value = {"t": [torch.arange(3, dtype=torch.int8)], "a": np.arange(4, dtype=">i2").reshape(2, 2),
             "n": np.float16(0.1), "f": io.BytesIO(b"xyz"), "e": torch.empty(0, 2)}  # fmt: skip
    again = through_json(value)
    assert torch.equal(again["t"][0], value["t"][0])  # type: ignore[index]
    np.testing.assert_array_equal(again["a"], value["a"])  # type: ignore[arg-type]
    assert (again["n"], again["n"].dtype) == (np.float16(0.1), np.dtype("float16"))
    assert again["f"].getvalue() == b"xyz"
    assert again["e"].shape == (0, 2)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        defaultdict(int),
        torch.Generator(),
        lambda: 0,
        {object(): 1},
        np.zeros(2, np.longdouble),
    ],
)
def test_what_cannot_come_back_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^x\.deep"):
        pack({"deep": [value] if not isinstance(value, dict) else value}, "x", {})


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="dense ones only"):
        pack(torch.eye(2).to_sparse(), "x", {})


def test_a_tree_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CheckpointError, match="levels deep"):
        pack(value, "x", {})


@pytest.mark.parametrize("packed", [
    {"$": "open", "of": "x"}, {"$": "tensor"}, {"$": "tensor", "tensor": "nowhere"}, {"$": "float", "of": "x"},
    {"$": "number", "dtype": "O", "of": ""}, {"$": "dtype", "of": "load"}, {"$": ["dict"], "of": []},
    {"$": "dict", "of": 3},
])  # fmt: skip
def test_what_pack_never_writes_is_refused(packed: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        unpack(packed, {})
