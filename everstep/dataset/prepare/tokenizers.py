"""Tokenizers: bytes, tiktoken, or a tokenizer.json of Hugging Face; and packing of tokens to samples."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from everstep.dataset.prepare.schema_cast import row_bytes
from everstep.dataset.shard_format import table_of
from everstep.errors import ConfigError

INSTALL = "pip install 'everstep[tokenizers]'"
BYTES = "bytes"
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")
"""Common names of the end-of-text token, used if the tokenizer's own config does not name it."""


class Tokens(NamedTuple):
    """Document i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]


class Tokenizer(Protocol):
    """Interface of a tokenizer for preparation."""

    separator: int
    """Token that follows each document when they are packed."""
    vocab: int
    """Number of tokens."""

    def encode(self, documents: pa.Array) -> Tokens:
        """Return the tokens of a column of large_string (large_binary for bytes), without special ones."""
        ...


def open_tokenizer(name: str, separator: str | None) -> Tokenizer:
    """Return the tokenizer that `bytes`, `tiktoken:NAME` or `hf:PATH` names.

    Raises:
        ConfigError: there is none; the message is one line.
    """
    if name == BYTES:
        return ByteTokenizer(separator)
    kind, _, which = name.partition(":")
    if kind == "tiktoken" and which:
        return TikToken(which, separator)
    if kind == "hf" and which:
        return HuggingFace(which, separator)
    raise ConfigError(f"tokenizer={name}: write bytes, tiktoken:NAME (such as tiktoken:gpt2) or hf:PATH")


def token_type(vocab: int) -> np.dtype[Any]:
    """Return the smallest unsigned integer type that holds every token."""
    return np.dtype(np.uint8 if vocab <= 2**8 else np.uint16 if vocab <= 2**16 else np.uint32)


class ByteTokenizer:
    """Each byte is a token; documents are separated by zero."""

    vocab = 256

    def __init__(self, separator: str | None) -> None:
        encoded = b"\0" if separator is None else separator.encode()
        if len(encoded) != 1:
            raise ConfigError(f"separator={separator!r} must be one byte with tokenizer=bytes")
        self.separator = encoded[0]

    def encode(self, documents: pa.Array) -> Tokens:
        values, offsets = row_bytes(documents)
        return Tokens(values[offsets[0] : offsets[-1]], offsets - offsets[0])


class TikToken:
    """A byte-pair encoding of the tiktoken package, which downloads its table at the first use."""

    def __init__(self, name: str, separator: str | None) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(f"tokenizer=tiktoken:{name} needs the package tiktoken: {INSTALL}") from error
        try:
            self._encoding = tiktoken.get_encoding(name)
        except ValueError as error:
            known = ", ".join(tiktoken.list_encoding_names())
            raise ConfigError(f"tokenizer=tiktoken:{name}: there is no such encoding; there are {known}") from error
        except OSError as error:
            reason = type(error).__name__
            raise ConfigError(
                f"tokenizer=tiktoken:{name} cannot be fetched ({reason}); set TIKTOKEN_CACHE_DIR to where it lies"
            ) from error
        self.vocab: int = self._encoding.n_vocab
        self.separator: int = self._encoding.eot_token if separator is None else self._single(separator)

    def _single(self, separator: str) -> int:
        tokens = self._encoding.encode(separator, allowed_special="all")
        if len(tokens) != 1:
            raise ConfigError(f"separator={separator!r} is {len(tokens)} tokens; give one that is a single token")
        return int(tokens[0])

    def encode(self, documents: pa.Array) -> Tokens:
        found = self._encoding.encode_ordinary_batch(documents.to_pylist(), num_threads=1)
        return _joined(found, self.vocab)


class HuggingFace:
    """A tokenizer.json on this machine, read by the tokenizers package."""

    def __init__(self, path: str, separator: str | None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(f"tokenizer=hf:{path} needs the package tokenizers: {INSTALL}") from error
        path = os.path.expanduser(path)
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.exists(file):
            raise ConfigError(f"tokenizer=hf:{path}: there is no {file}; give a tokenizer.json or its folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the package raises plain Exception
            raise ConfigError(f"tokenizer=hf:{path}: {file} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        names = [separator] if separator is not None else [_own_end(file), *ENDS]
        ends = [self._tokenizer.token_to_id(name) for name in names if name]
        known = [end for end in ends if end is not None]
        if not known:
            looked = f"no token {separator!r}" if separator else "no end of text that we know"
            raise ConfigError(f"tokenizer=hf:{path} has {looked}; set separator= to one of its tokens")
        self.separator: int = known[0]
        self.vocab = max(self.vocab, self.separator + 1)

    def encode(self, documents: pa.Array) -> Tokens:
        found = self._tokenizer.encode_batch_fast(documents.to_pylist(), add_special_tokens=False)
        return _joined([encoding.ids for encoding in found], self.vocab)


def _own_end(file: str) -> str | None:
    """Return the end-of-text token named in the tokenizer_config.json beside the file."""
    beside = os.path.join(os.path.dirname(file), "tokenizer_config.json")
    if not os.path.exists(beside):
        return None
    with open(beside, encoding="utf-8") as opened:
        end = json.load(opened).get("eos_token")
    return end.get("content") if isinstance(end, dict) else end


def _joined(documents: list[list[int]], vocab: int) -> Tokens:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    values = np.empty(int(offsets[-1]), token_type(vocab))
    for document, start, stop in zip(documents, offsets[:-1], offsets[1:], strict=True):
        values[start:stop] = document
    return Tokens(values, offsets)


TOKENS = "tokens"


def ragged(tokens: Tokens, kind: np.dtype[Any]) -> pa.Array:
    """Return a column with the tokens of each document."""
    return pa.LargeListArray.from_arrays(tokens.offsets, pa.array(tokens.values.astype(kind, copy=False)))


class Packer:
    """Joins documents with a separator after each, and splits them into blocks of `width`.

    The rest stays in `tail` until more documents are added.
    """

    def __init__(self, width: int, separator: int, kind: np.dtype[Any]) -> None:
        self._width = width
        self._separator = separator
        self.tail: NDArray[Any] = np.empty(0, kind)

    def add(self, tokens: Tokens) -> pa.Table:
        """Add documents; return the blocks that are now full."""
        kind = self.tail.dtype
        joined = np.insert(tokens.values.astype(kind, copy=False), tokens.offsets[1:], kind.type(self._separator))
        return self.cut(joined)

    def cut(self, stream: NDArray[Any]) -> pa.Table:
        """Add tokens with their separators; return the blocks that are now full."""
        stream = np.concatenate([self.tail, stream])
        full = len(stream) // self._width * self._width
        self.tail = stream[full:].copy()
        return table_of({TOKENS: stream[:full].reshape(-1, self._width)})
