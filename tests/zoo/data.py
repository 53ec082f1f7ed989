"""Samples for the models of the zoo."""

from __future__ import annotations

import numpy as np

from everstep import ArrayDataset, Splits


def samples(count: int = 48, held_out: int = 8) -> Splits:
    x = np.random.default_rng(0).normal(size=(count + held_out, 6)).astype("float32")
    y = np.sin(x.sum(1)).astype("float32")
    train, validation = {"x": x[:count], "y": y[:count]}, {"x": x[count:], "y": y[count:]}
    return Splits(ArrayDataset(train), ArrayDataset(validation) if held_out else None)


def doubles() -> Splits:
    """Columns of float64, as a table has them."""
    found = samples()
    return Splits(ArrayDataset({name: column.astype("float64") for name, column in found.train.columns.items()}))  # type: ignore[attr-defined]
