"""Pictures of attributions: a map over an image, bars of a table or of a series. PNG bytes."""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

MOST_BARS = 60


def picture(title: str, column: str, raw: Tensor, values: Tensor) -> bytes | None:
    """Return a PNG of one sample's attributions; None for a form without a picture.

    Args:
        title: the sample and its output, in one line.
        raw: the input: [channels, h, w] or [n].
        values: its attributions, of the same shape.
    """
    if values.dim() not in (1, 3):
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    (_draw_map if values.dim() == 3 else _draw_bars)(figure, column, raw, values)
    figure.suptitle(title)
    file = io.BytesIO()
    canvas.print_png(file, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return file.getvalue()


def _draw_map(figure: Any, column: str, raw: Tensor, values: Tensor) -> None:
    total = values.float().sum(dim=0).numpy()
    limit = max(float(abs(total).max()), 1e-12)
    left, right = figure.subplots(1, 2)
    left.imshow(raw.float().mean(dim=0).numpy(), cmap="gray")
    left.set_title(column)
    shown = right.imshow(total, cmap="RdBu_r", vmin=-limit, vmax=limit)
    right.set_title("attribution")
    figure.colorbar(shown, ax=right)


def _draw_bars(figure: Any, column: str, raw: Tensor, values: Tensor) -> None:
    chosen = values.abs().argsort(descending=True, stable=True)[:MOST_BARS].sort().values
    axes = figure.subplots()
    heights = values.float()[chosen].numpy()
    axes.bar([str(place) for place in chosen.tolist()], heights, color=["C3" if h > 0 else "C0" for h in heights])
    axes.set_xlabel(f"position in {column}")
    axes.set_ylabel("attribution")
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
