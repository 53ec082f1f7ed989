"""A real series that comes with Everstep: weekly CO2 at Mauna Loa from 1958 to 2001, cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everstep.errors import ConfigError, DataError
from everstep.trainer.data.dataset import ArrayDataset, Splits

CSV = Path(__file__).parent / "series/co2_weekly.csv"
"""Dates and ppm; README.md beside it has source and licence."""
SEASON = 52
"""Weeks of a year."""


def co2_windows(past: int = 104, horizon: int = 26, held_out: float = 0.25) -> Splits:
    """Return windows of a series in ppm, split by time.

    The held-out windows are those whose `future` is in the last part of the series; no week of it is in a training
    window. Batches have `past` float32 [n, past], `future` float32 [n, horizon] and `scale` float32 [n]: the mean error
    of a forecast by the value of a year ago, over the weeks of the training windows.

    Args:
        past: weeks that a forecast is made from.
        horizon: weeks that are forecast.
        held_out: fraction of the series that is held out.
    """
    series = _weekly()
    cut = round(len(series) * (1 - held_out))
    if past < 1 or horizon < 1 or not past + horizon <= cut <= len(series) - horizon:
        raise ConfigError(
            f"data.held_out={held_out} leaves {cut} weeks to train on and {len(series) - cut} held out, which do not "
            f"hold windows of data.past={past} and data.horizon={horizon} weeks; choose smaller ones"
        )
    known = series[:cut]
    scale = np.abs(known[SEASON:] - known[:-SEASON]).mean()
    return Splits(
        _windows(known, past, horizon, scale),
        _windows(series[cut - past :], past, horizon, scale),
    )


def _windows(series: NDArray[np.float32], past: int, horizon: int, scale: np.floating[Any]) -> ArrayDataset:
    """Return every window of the series."""
    rows = np.lib.stride_tricks.sliding_window_view(series, past + horizon)
    return ArrayDataset(
        {
            "past": np.ascontiguousarray(rows[:, :past]),
            "future": np.ascontiguousarray(rows[:, past:]),
            "scale": np.full(len(rows), scale, np.float32),
        }
    )


def _weekly() -> NDArray[np.float32]:
    """Return the value of every week; a straight line bridges weeks without a measurement."""
    try:
        import pandas as pd
    except ImportError as error:
        raise DataError("this dataset needs pandas: pip install 'everstep[examples]'") from error
    table = pd.read_csv(CSV, parse_dates=["date"], index_col="date", date_format="%Y%m%d")
    return table["co2"].interpolate("time").to_numpy(np.float32)
