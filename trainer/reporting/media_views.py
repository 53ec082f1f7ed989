"""Texts, pictures, tables and histograms as W&B and TensorBoard show them."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]
MOST_ROWS = 200
"""Rows of a table that TensorBoard shows: there it is a text."""


def media_value(record: Record) -> Any:
    """Return the value that W&B shows for a record."""
    import wandb

    kind = record["type"]
    if kind == "text":
        return wandb.Html(f"<pre>{html.escape(record['text'])}</pre>", inject=False)
    if kind == "table":
        return wandb.Table(columns=list(record["columns"]), data=list(record["rows"]), allow_mixed_types=True)
    if kind == "histogram":
        return wandb.Histogram(np_histogram=(record["counts"], record["edges"]))
    if importlib.util.find_spec("PIL") is None:  # W&B's own pictures need it
        source = base64.b64encode(record["png"]).decode()
        caption = html.escape(record["caption"])
        return wandb.Html(f'<img src="data:image/png;base64,{source}"><p>{caption}</p>', inject=False)
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(record["png"])), caption=record["caption"] or None)


def add_media(writer: Any, record: Record) -> None:
    """Add a record to TensorBoard's event files by its SummaryWriter."""
    kind, tag, step, at = record["type"], f"media/{record['name']}", record["step"], record["time"]
    if kind == "text":
        writer.add_text(tag, record["text"], step, walltime=at)
    elif kind == "table":
        writer.add_text(tag, _markdown(record["columns"], record["rows"]), step, walltime=at)
    elif kind == "histogram":
        _add_histogram(writer, tag, record, step, at)
    else:
        _add_picture(writer, tag, record, step, at)


def _add_picture(writer: Any, tag: str, record: Record, step: int, at: float) -> None:
    """Add a PNG file as it is; the writer's own `add_image` needs Pillow to make one."""
    summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    image = summaries.Summary.Image(
        height=record["height"], width=record["width"], colorspace=3, encoded_image_string=record["png"]
    )
    summary = summaries.Summary(value=[summaries.Summary.Value(tag=tag, image=image)])
    writer.file_writer.add_summary(summary, step, walltime=at)


def _add_histogram(writer: Any, tag: str, record: Record, step: int, at: float) -> None:
    edges, counts = record["edges"], record["counts"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    writer.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
        walltime=at,
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows[:MOST_ROWS]]
    left = [f"\n{len(rows) - MOST_ROWS} more rows are in the run folder"] if len(rows) > MOST_ROWS else []
    return "\n".join([*("| " + " | ".join(map(_escaped, line)) + " |" for line in lines), *left])


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
