"""Plan of a preparation: the columns, the units of work, and the digests that detect changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from blake3 import blake3

from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.schema_cast import select, stored_schema
from everstep.dataset.prepare.tokenizers import BYTES, TOKENS, Tokenizer, open_tokenizer, token_type
from everstep.dataset.prepare.work_unit import Job
from everstep.dataset.readers.base import File, Piece, Reader, Unit, units
from everstep.dataset.readers.source_files import is_url
from everstep.dataset.tags import TAGS
from everstep.errors import DataError

LAYOUT = 2
"""Version of the shards' content; raised when the same source and options would give other shards.

Otherwise a resumed preparation would mix old and new shards.
"""


@dataclass(frozen=True)
class Plan:
    """A job, divided into units."""

    job: Job
    units: list[Unit]
    size: int
    """Bytes of the source."""
    attributes: dict[str, Any]
    """Facts for the index of how the dataset was made."""
    made_by: str
    """Digest of the options and columns."""

    @property
    def made_of(self) -> str:
        """Digest of the sources and their division into units."""
        return _digest([_facts(unit) for unit in self.units])

    @property
    def mark(self) -> str | None:
        """Mark in the index by which a command finds its work done.

        None for a source without a lasting stamp.
        """
        lasts = all(piece.file.is_lasting for unit in self.units for piece in unit.pieces)
        return f"{self.made_by}-{self.made_of}" if lasts else None


def plan(options: PrepareOptions, reader: Reader, files: Sequence[File], every: int = 0) -> Plan:
    """Inspect the sources and divide the work; the same on every machine for any number of processes."""
    there = reader.open(files)
    tokenizer = open_tokenizer(options.tokenizer, options.separator) if options.tokenizer else None
    text = _text_column(options, there) if tokenizer else None
    kept = _kept(options, there, text)
    reader.chosen = options.columns is not None or text is not None
    extra = [options.key] if options.key and options.key not in kept else []
    source = select(there, [*kept, *extra])
    problem = next((reader.problems[name] for name in source.names if name in reader.problems), None)
    if problem:
        raise DataError(problem)
    target = stored_schema(source)
    if text is not None:
        kind = pa.large_binary() if options.tokenizer == BYTES else pa.large_string()
        target = target.set(target.get_field_index(text), pa.field(text, kind))
    output = _output(options, target, kept, text, tokenizer)
    job = Job(options, reader, source, target, output, text, every)
    size = sum(file.size for file in files)
    unit_bytes = min(4 * options.shard_bytes, max(options.shard_bytes, size // 64))
    pieces = _pieces(reader, files, unit_bytes)
    made_by = _digest([LAYOUT, options.lasting(), every, str(source), str(output), type(reader).__name__])
    attributes = {**_attributes(options, tokenizer), **reader.attributes(), **_provenance(options, files)}
    if every:
        attributes["validation_every"] = every
    return Plan(job, units(pieces, unit_bytes), size, attributes, made_by)


def _pieces(reader: Reader, files: Sequence[File], size: int) -> Iterator[Piece]:
    """Yield the pieces of the files in order; files in a store are read in parallel to hide round trips."""
    with ThreadPoolExecutor(16 if files and is_url(files[0].url) else 1) as pool:
        for found in pool.map(lambda file: reader.cut(file, size), files):
            yield from found


def unit_digest(unit: Unit) -> str:
    """Return the digest of a unit's input: names, sizes and times of its files, and the parts to read."""
    return _digest(_facts(unit))


def _facts(unit: Unit) -> list[Any]:
    return [[p.file.url, p.file.size, p.file.stamp, p.start, p.stop] for p in unit.pieces]


def _digest(content: Any) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest(length=16)


def _text_column(options: PrepareOptions, there: pa.Schema) -> str:
    if options.text is not None:
        field = select(there, [options.text]).field(0)
        if not _is_text(field.type):
            raise DataError(f"text={options.text} is a column of {field.type}, not of text or bytes")
        return options.text
    found = [str(field.name) for field in there if _is_text(field.type)]
    for name in ("text", "bytes"):
        if name in found:
            return name
    if len(found) != 1:
        raise DataError(f"which column is the text? set text= to one of {', '.join(there.names)}")
    return found[0]


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _kept(options: PrepareOptions, there: pa.Schema, text: str | None) -> list[str]:
    """Return the columns to read for the samples: those of `columns` and the text, else the text alone.

    Without a tokenizer and `columns`, return all.
    """
    if options.columns is not None:
        names = select(there, options.columns).names
        return names if text is None or text in names else [*names, text]
    return list(there.names) if text is None else [text]


def _output(
    options: PrepareOptions, target: pa.Schema, kept: list[str], text: str | None, tokenizer: Tokenizer | None
) -> pa.Schema:
    if text is None or tokenizer is None:
        return pa.schema([target.field(name) for name in kept])
    kind = pa.from_numpy_dtype(token_type(tokenizer.vocab))
    column = pa.field(TOKENS, pa.list_(kind, options.pack + 1) if options.pack else pa.large_list(kind))
    return pa.schema([*(target.field(name) for name in kept if name not in (text, TOKENS)), column])


def _attributes(options: PrepareOptions, tokenizer: Tokenizer | None) -> dict[str, Any]:
    found: dict[str, Any] = {"compression": options.compression}
    found |= {TAGS: dict(options.tags)} if options.tags else {}
    if options.validation:
        found |= {"validation": options.validation, "key": options.key}
    if options.dedup:
        found["dedup"] = True
    if tokenizer is not None:
        found |= {"tokenizer": options.tokenizer, "separator": tokenizer.separator, "vocab": tokenizer.vocab}
        found |= {"pack": options.pack} if options.pack else {}
    return found


def _provenance(options: PrepareOptions, files: Sequence[File]) -> dict[str, Any]:
    """Return the sources of the samples, without credentials in a URL."""
    return {"src": [bare(source) for source in options.src], "files": len(files)}


def bare(source: str) -> str:
    """Return a URL without user, password and query."""
    scheme, colon, rest = source.partition("://")
    if not colon:
        return source
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
