"""Choice of the reader for a source: by format=, or by the suffix of its files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from everstep.dataset.index import INDEX
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.readers.base import File, Reader
from everstep.dataset.readers.hive import Hive, parts_of
from everstep.dataset.readers.source_files import list_files
from everstep.dataset.readers.streams import suffix_of
from everstep.dataset.readers.whole_files import IMAGES
from everstep.errors import ConfigError, DataError

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".tar": "webdataset",
    ".tgz": "webdataset",
    ".tbz2": "webdataset",
    ".txz": "webdataset",
    ".npy": "npy",
    ".npz": "npy",
    **dict.fromkeys(IMAGES, "images"),
}
NAMED = ("files", "images", "hf")
"""Formats in which the names of folders have another meaning than COLUMN=VALUE."""


def open_source(options: PrepareOptions) -> tuple[Reader, list[File]]:
    """Return the reader and the files that it reads."""
    if options.format == "generator":
        from everstep.dataset.readers.in_memory import Generator, imported, in_memory

        if len(options.src) != 1:
            raise ConfigError(f"src=[{','.join(options.src)}]: with format=generator give one package.module:function")
        imported(options.src[0])
        return Generator(options.src[0]), [in_memory(options.src[0])]
    files = [file for file in list_files(options.src) if not _is_marker(file)]
    if any(suffix_of(file) == ".arrow" for file in files):  # a dataset may be prepared again, in another way
        files = [file for file in files if os.path.basename(file.url) != INDEX]
    inside = f"{os.path.abspath(os.path.expanduser(options.dst))}/"
    for file in files:
        if os.path.abspath(file.url).startswith(inside):
            raise ConfigError(f"src holds {file.url}, which lies in dst={options.dst}; choose another dst")
    name = options.format or format_of(files)
    reader = reader_of(name)
    chosen = reader.choose(files)
    if name not in NAMED and any(parts_of(file) for file in chosen):
        reader = Hive(reader)
    return reader, chosen


def format_of(files: Sequence[File]) -> str:
    """Return the format that all files have by their suffix; raise DataError if they differ."""
    names = {os.path.basename(file.url) for file in files}
    if {"state.json", "dataset_info.json"} <= names:
        return "hf"
    found: dict[str, File] = {}
    for file in files:
        found.setdefault(SUFFIXES.get(suffix_of(file), "files"), file)
    if len(found) > 1:
        listed = ", ".join(f"{file.url} ({name})" for name, file in sorted(found.items()))
        raise DataError(f"src holds files of several formats: {listed}; set format= or a narrower src=")
    if not found:
        raise DataError("src holds no file with samples; set src=")
    return next(iter(found))


def reader_of(name: str) -> Reader:
    """Return a reader of the format `name`, whose module is imported only now."""
    from everstep.dataset.readers import arrow, csv, json_files, npy, parquet, text, webdataset
    from everstep.dataset.readers import whole_files as files

    readers: dict[str, type[Reader]] = {
        "parquet": parquet.Parquet,
        "arrow": arrow.Arrow,
        "hf": arrow.HuggingFace,
        "csv": csv.Csv,
        "jsonl": json_files.JsonLines,
        "json": json_files.JsonLines,
        "text": text.Text,
        "files": files.Files,
        "images": files.Images,
        "webdataset": webdataset.WebDataset,
        "npy": npy.NumPy,
    }
    return readers[name]()


def _is_marker(file: File) -> bool:
    """True for files such as _SUCCESS and _metadata, which engines leave beside the data."""
    name = os.path.basename(file.url)
    return name.startswith("_") and "." not in name
