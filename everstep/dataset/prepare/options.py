"""Options of `everstep data prepare`: every key with type, default, unit and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.dataset.tags import parse_tags
from everstep.errors import ConfigError, nearest

FORMATS = (
    "parquet",
    "arrow",
    "hf",
    "csv",
    "jsonl",
    "json",
    "text",
    "files",
    "images",
    "webdataset",
    "npy",
    "generator",
)
COMPRESSIONS = ("none", "lz4", "zstd")
MOST_COMPRESSED_MIB = 1024
"""MiB of a compressed shard; readers refuse shards that are far larger once decompressed."""
FREE_ON_RESUME = ("dst", "processes", "max_bad", "append")
"""Keys that change nothing in the output of a unit of work, so that a restart may change them."""


@dataclass(kw_only=True)
class PrepareOptions:
    """Options of a preparation: the source, and the form of the dataset."""

    src: list[str] = field(default_factory=list)
    """Files, folders, globs (`**` matches folders), URLs of any fsspec store, or package.module:function."""
    dst: str = ""
    """Folder or URL of the dataset; it may be a dataset already only with append=true."""
    format: str | None = None
    """One of FORMATS; null takes it from the files' suffix."""
    columns: list[str] | None = None
    """Columns to keep, in this order; null keeps all."""
    tokenizer: str | None = None
    """bytes, tiktoken:NAME or hf:PATH of a tokenizer.json; null stores the columns as they are."""
    text: str | None = None
    """Column to tokenise; null takes `text`, else the only column of text or bytes."""
    separator: str | None = None
    """Token after each document; null is the tokenizer's own end of text (zero for bytes)."""
    pack: int | None = None
    """Samples of pack + 1 tokens, the last only a target; null makes one sample of each document."""
    compression: str = "none"
    """none, lz4 or zstd; none is read without a copy."""
    shard_mib: float = 64
    """MiB of a shard, before compression."""
    processes: int | None = None
    """Units of work at a time; null is the number of cores. The dataset does not depend on it."""
    validation: float = 0
    """Fraction to hold out, chosen by the digest of `key`.

    Above 0, DST/train and DST/validation are the datasets.
    """
    key: str | None = None
    """Column whose digest decides the split of a sample; null is the whole content."""
    dedup: bool = False
    """Keep the first of samples (documents, when tokenised) with equal content; costs a second reading."""
    max_bad: int = 0
    """Records that may be left out because they cannot be read; each is recorded in DST/bad.jsonl."""
    tags: dict[str, str] = field(default_factory=dict)
    """Facts for readers and for `policy.allow_tags`, such as license and source; kept in the index."""
    append: bool = False
    """Add the samples to the dataset in DST, whose shards are not changed."""

    def __post_init__(self) -> None:
        for name, allowed in (("format", (None, *FORMATS)), ("compression", COMPRESSIONS)):
            value = getattr(self, name)
            if value not in allowed:
                choices = [choice for choice in allowed if choice]
                raise ConfigError(f"{name}={value} is none of {', '.join(choices)}{nearest(str(value), choices)}")
        least: dict[str, float] = {"pack": 1, "processes": 1, "shard_mib": 2**-20, "max_bad": 0, "validation": 0}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{name}={value} must be at least {limit:g}")
        if self.compression != "none" and self.shard_mib > MOST_COMPRESSED_MIB:
            raise ConfigError(
                f"shard_mib={self.shard_mib:g} with compression={self.compression}: at most {MOST_COMPRESSED_MIB}, as "
                "readers decompress a shard as a whole"
            )
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ConfigError(f"columns=[{','.join(self.columns)}] names a column twice")
        if self.validation >= 1:
            raise ConfigError(f"validation={self.validation:g} must be below 1, or nothing is left to train on")
        if self.pack is not None and self.tokenizer is None:
            raise ConfigError(f"pack={self.pack} cuts tokens: give tokenizer=bytes (or tiktoken:NAME, hf:PATH)")
        if self.pack is not None and self.columns is not None:
            raise ConfigError(f"pack={self.pack} leaves the column tokens only: remove columns=, or pack=")
        if self.tokenizer is None and (self.text or self.separator):
            raise ConfigError("text and separator say how to tokenise: give tokenizer= too, or remove them")

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard."""
        return max(1, round(self.shard_mib * 2**20))

    def lasting(self) -> dict[str, Any]:
        """Return the options that determine the output; the sources are part of the units."""
        left_out = (*FREE_ON_RESUME, "src")
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        if not self.tags:
            del found["tags"]  # so that datasets without tags are those of earlier versions
        return found


KEYS = tuple(option.name for option in dataclasses.fields(PrepareOptions))
LISTS = ("src", "columns")


def parse(words: Sequence[str]) -> PrepareOptions:
    """Return the options of a command line of key=value.

    Raises:
        ConfigError: a key or value is wrong; the message is one line.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}: write key=value{nearest(word, KEYS)}")
        if key not in KEYS:
            raise ConfigError(f"no key {key!r}{nearest(key, KEYS)}; there are {', '.join(KEYS)}")
        if key in given:
            raise ConfigError(f"{key} is given twice; a list is {key}=[a,b]")
        given[key] = _read(key, value)
    for key in ("src", "dst"):
        if not given.get(key):
            raise ConfigError(f"{key}= is missing: everstep data prepare src=… dst=…")
    return typed(given)


def _read(key: str, value: str) -> Any:
    if key == "tags":
        return parse_tags(value)
    return None if value == "null" else _listed(value) if key in LISTS else value


def typed(given: Mapping[str, Any]) -> PrepareOptions:
    """Return the options with their types checked.

    Raises:
        ConfigError: a value has the wrong type; the message is one line.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(PrepareOptions)
    for key, value in given.items():
        try:
            OmegaConf.update(tree, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    options = OmegaConf.to_object(tree)
    if not isinstance(options, PrepareOptions):
        raise ConfigError(f"the options compose to {type(options).__name__}")
    return options


def _listed(value: str) -> list[str]:
    """Return `a`, or the items of `[a,b]`; not parsed as YAML, in which the * of a glob has a meaning."""
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    words = (word.strip().strip("'\"") for word in value[1:-1].split(","))
    return [word for word in words if word]
