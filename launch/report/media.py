"""Texts, pictures, tables and histograms that the task has logged; the last of each name."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.run_folder import MEDIA, PICTURES, RunFolder
from everstep.storage import read_limited

MOST_NAMES = 24
MOST_ROWS, MOST_COLUMNS = 20, 12
LONGEST_TEXT, LONGEST_CELL = 4000, 200
PICTURE_BYTES, PICTURES_BYTES = 150_000, 600_000
"""Limit of one picture, and of all."""
PNG = b"\x89PNG\r\n\x1a\n"
FILE = re.compile(rf"{PICTURES}/[A-Za-z0-9_-]{{1,120}}\.png")


@dataclass(frozen=True)
class Logged:
    """One text, picture, table or histogram, the last of its name."""

    kind: str
    name: str
    step: int
    records: int
    """Records of this name in the run."""
    text: str = ""
    """Text, or the caption of a picture, or why it is left out."""
    png: str = ""
    """Base64."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    more_rows: int = 0
    edges: Sequence[float] = ()
    counts: Sequence[int] = ()


@dataclass(frozen=True)
class LoggedMedia:
    """Records that a page shows, and the number of names that it leaves out."""

    shown: Sequence[Logged] = ()
    left_out: int = 0


def logged(folder: RunFolder, attempts: Sequence[int]) -> LoggedMedia:
    last: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    counts: dict[tuple[str, str], int] = {}
    for attempt in attempts:
        for record in folder.lines(attempt, MEDIA):
            key = (str(record.get("type")), str(record.get("name")))
            if type(record.get("step")) is int:
                last[key] = (attempt, record)
                counts[key] = counts.get(key, 0) + 1
    room = PICTURES_BYTES
    shown: list[Logged] = []
    for (kind, name), (attempt, record) in list(last.items())[:MOST_NAMES]:
        more = _content(folder, attempt, kind, record, room)
        room -= len(more.get("png", "")) * 3 // 4
        shown.append(Logged(kind, name, record["step"], counts[kind, name], **more))
    return LoggedMedia(shown, max(0, len(last) - MOST_NAMES))


def _content(folder: RunFolder, attempt: int, kind: str, record: Mapping[str, Any], room: int) -> dict[str, Any]:
    if kind == "text":
        return {"text": str(record.get("text"))[:LONGEST_TEXT]}
    if kind == "table":
        return _table(record)
    if kind == "histogram":
        edges, counts = list(_numbers(record.get("edges"))), list(_numbers(record.get("counts")))
        return {"edges": edges, "counts": counts} if len(edges) == len(counts) + 1 else {"text": "damaged"}
    if kind == "image":
        return _picture(folder, attempt, record, room)
    return {"text": "unknown kind of record"}


def _table(record: Mapping[str, Any]) -> dict[str, Any]:
    columns, rows = record.get("columns"), record.get("rows")
    if type(columns) is not list or type(rows) is not list or not all(type(row) is list for row in rows):
        return {"text": "damaged"}
    cells = [[str(cell)[:LONGEST_CELL] for cell in row[:MOST_COLUMNS]] for row in rows[:MOST_ROWS]]
    return {
        "columns": [str(name)[:LONGEST_CELL] for name in columns[:MOST_COLUMNS]],
        "rows": cells,
        "more_rows": max(0, len(rows) - MOST_ROWS),
    }


def _numbers(values: object) -> Iterator[float]:
    if type(values) is list:
        yield from (value for value in values if type(value) in (int, float))


def _picture(folder: RunFolder, attempt: int, record: Mapping[str, Any], room: int) -> dict[str, Any]:
    """Return a picture as base64; the name of its file comes from the folder, so it is checked first."""
    caption, file = str(record.get("caption") or "")[:LONGEST_TEXT], str(record.get("file"))
    if not FILE.fullmatch(file):
        return {"text": f"{caption} (damaged: no name of a picture)"}
    path = folder.attempt(attempt, file)
    try:
        data = read_limited(folder.storage, path, min(PICTURE_BYTES, room))
    except FileNotFoundError:
        return {"text": f"{caption} ({path} is missing)"}
    except ValueError:
        return {"text": f"{caption} (too large for this page: {path})"}
    if not data.startswith(PNG):
        return {"text": f"{caption} ({path} is no PNG file)"}
    return {"text": caption, "png": base64.b64encode(data).decode()}
