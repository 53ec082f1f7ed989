"""The sources of Python's standard library as subwords of a byte-level BPE, in packed documents."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everstep.dataset.index import TRAIN, VALIDATION
from everstep.dataset.prepare import prepare_blocks, prepared
from everstep.dataset.prepare.tokenizers import INSTALL
from everstep.errors import ConfigError, DataError
from everstep.storage import open_storage
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.collate import Columns, Segments
from everstep.trainer.data.dataset import Splits
from everstep.trainer.data.randomness import draws_nothing
from everstep.trainer.data.stdlib_corpus import HELD_OUT_EVERY, stdlib_sources

TOKENIZER, BIGRAMS, BLOCKS = "tokenizer.json", "bigrams.npy", "blocks"
END = "<|endoftext|>"
LEARNT_FROM_EVERY = 10
"""The merges are learnt from each n-th training file.

All of them take five times as long, for 2 % fewer tokens.
"""


def stdlib_subwords(path: str, block: int = 64, vocab: int = 1024) -> Splits:
    """Return the standard library's .py files without tests, as blocks of subwords of a byte-level BPE.

    Every 20th file is held out, as in `stdlib_corpus`. Folder `path` gets tokenizer and dataset at the first use.
    Columns: `tokens` uint16 [n, block + 1], `segments` and `positions` of `Segments`, and `bytes` and `baseline_bits`
    of `CountBytes`.

    Raises:
        DataError: `path` holds a dataset of another block or vocabulary.
        ConfigError: `vocab` is too small, or the package tokenizers is not installed.
    """
    if vocab <= 257:
        raise ConfigError(f"data.vocab={vocab}: 256 bytes and the end of a text are tokens already; choose 512 or more")
    storage, blocks = open_storage(path), os.path.join(path, BLOCKS)
    if not storage.exists(TOKENIZER):
        storage.create(TOKENIZER, _trained(vocab).encode())  # of two processes the first one's stays
    if not prepared(blocks):
        tokenizer = f"hf:{os.path.join(path, TOKENIZER)}"
        prepare_blocks(stdlib_sources(), blocks, block, tokenizer=tokenizer, validation_every=HELD_OUT_EVERY)
    train, validation = (ArrowDataset(os.path.join(blocks, split)) for split in (TRAIN, VALIDATION))
    there = ((train.index.columns["tokens"].shape[0] or 1) - 1, train.index.attributes["vocab"])
    if there != (block, vocab):
        raise DataError(
            f"{path} was prepared with block={there[0]} vocab={there[1]}, not block={block} vocab={vocab}; "
            "set data.path to another folder"
        )
    separator = int(train.index.attributes["separator"])
    spelled = spellings(storage.read(TOKENIZER), separator)
    if not storage.exists(BIGRAMS):
        storage.create(BIGRAMS, _saved(_bigrams(train, spelled)))
    counts = np.load(io.BytesIO(storage.read(BIGRAMS)), allow_pickle=False)
    return Splits(train, validation, collate=CountBytes(separator, spelled, counts))


def spellings(tokenizer: bytes, separator: int) -> list[bytes]:
    """Return the bytes of each token of a byte-level tokenizer.json; of the separator one zero byte."""
    tokenizers = _package()
    numbers: Mapping[str, int] = tokenizers.Tokenizer.from_buffer(tokenizer).get_vocab()
    # GPT-2 writes each byte as one printable character: itself, or the next that is free from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet |= {chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*plain}))}
    found = [b"\0"] * len(numbers)
    for text, number in numbers.items():
        if number != separator:
            found[number] = bytes(alphabet[character] for character in text)
    return found


@draws_nothing
class CountBytes:
    """`Segments`, and two columns shaped like `tokens` that make losses comparable with those over bytes.

    * `bytes`: int64, bytes of each token;
    * `baseline_bits`: float32, bits of the token's bytes by a table of byte pairs, given the token before it.
    """

    def __init__(self, separator: int, spelled: list[bytes], counts: NDArray[np.int64]) -> None:
        """Take the bytes of each token, and how often byte j follows byte i in the training data, [256, 256]."""
        self._segments = Segments(separator)
        self._lengths = torch.tensor([len(token) for token in spelled])
        smooth = counts + 1.0
        bits = -np.log2(smooth / smooth.sum(axis=1, keepdims=True))
        inner = np.array([sum(bits[a, b] for a, b in pairwise(token)) for token in spelled])
        self._bits = torch.from_numpy((bits[:, [token[0] for token in spelled]] + inner).astype(np.float32))
        """[256, vocabulary]: bits of a token after a byte."""
        self._last = torch.tensor([token[-1] for token in spelled])

    def __call__(self, batch: Columns) -> dict[str, Tensor]:
        """Return the batch with all columns; the first token of a row has no bits."""
        found = self._segments(batch)
        tokens = found["tokens"].long()
        bits = torch.zeros(tokens.shape)
        bits[:, 1:] = self._bits[self._last[tokens[:, :-1]], tokens[:, 1:]]
        return {**found, "bytes": self._lengths[tokens], "baseline_bits": bits}


def _trained(vocab: int) -> str:
    """Return a tokenizer.json, learnt from training files alone."""
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    training = (source for n, (_, source) in enumerate(stdlib_sources(), start=1) if n % HELD_OUT_EVERY)
    chosen = (source.decode() for n, source in enumerate(training) if n % LEARNT_FROM_EVERY == 0)
    tokenizer.train_from_iterator(chosen, trainer)
    return str(tokenizer.to_str())


def _bigrams(train: ArrowDataset, spelled: list[bytes]) -> NDArray[np.int64]:
    """Return how often byte j follows byte i within the training blocks, int64 [256, 256]."""
    tokens = train.take(np.arange(len(train)))["tokens"]
    assert isinstance(tokens, Tensor)
    text = np.frombuffer(b"".join(spelled[token] for token in tokens.flatten().tolist()), np.uint8)
    pairs = text[:-1].astype(np.int64) * 256 + text[1:]
    return np.bincount(pairs, minlength=256 * 256).reshape(256, 256)


def _saved(array: NDArray[np.int64]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _package() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ConfigError(f"data: this dataset needs the package tokenizers: {INSTALL}") from error
    return tokenizers
