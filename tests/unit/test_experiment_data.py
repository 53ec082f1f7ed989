"""The data of the experiments that need more than scikit-learn: honest splits, and columns that are what they say."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.errors import ConfigError, DataError
from everstep.trainer.data import stdlib_subwords as subwords
from everstep.trainer.data.glyphs import glyphs
from everstep.trainer.data.sklearn_datasets import most_common


def test_no_name_of_a_held_out_letter_is_trained_on_and_words_are_numbered_by_training_names() -> None:
    splits = glyphs(last_code=0x17F)
    train, held_out = splits.train.columns, splits.validation.columns
    assert not set(train["name"]) & set(held_out["name"])
    assert len(set(held_out["name"])) > 20
    assert set(np.unique(held_out["words"])) <= set(np.unique(train["words"]))
    for columns in (train, held_out):
        for name in np.unique(columns["name"])[:5]:
            rows = columns["words"][columns["name"] == name]
            assert len(rows) > 1
            assert (rows == rows[0]).all()
    assert train["image"].shape[1:] == (1, 32, 32)
    assert train["image"].max() == 1
    assert glyphs(last_code=0x17F).train.digest == splits.train.digest


def test_glyphs_without_their_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fontTools.ttLib", None)
    with pytest.raises(DataError, match=r"pip install 'everstep\[glyphs\]'"):
        glyphs()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    with pytest.MonkeyPatch.context() as patch:
        every = subwords.stdlib_sources
        patch.setattr(subwords, "stdlib_sources", lambda: islice(every(), 0, None, 30))
        subwords.stdlib_subwords(str(path), block=32, vocab=400)
    return path


def test_tokens_spell_the_sources_byte_by_byte(prepared: Path) -> None:
    splits = subwords.stdlib_subwords(str(prepared), block=32, vocab=400)
    spelled = subwords.spellings((prepared / "tokenizer.json").read_bytes(), 0)
    tokens = splits.train.take(np.arange(len(splits.train)))["tokens"]
    text = b"".join(spelled[token] for token in tokens.flatten().tolist())
    training = [source for n, (_, source) in enumerate(islice(subwords.stdlib_sources(), 0, None, 30), 1) if n % 20]
    whole = b"".join(source + b"\0" for source in training)
    assert text == whole[: len(text)]
    assert len(text) > 0.99 * len(whole)
    found = splits.collate({"tokens": tokens[:50]})
    assert found["bytes"].tolist() == [[len(spelled[token]) for token in row] for row in tokens[:50].tolist()]


def test_the_bits_of_the_baseline_are_those_of_a_table_of_byte_pairs(prepared: Path) -> None:
    splits = subwords.stdlib_subwords(str(prepared), block=32, vocab=400)
    spelled = subwords.spellings((prepared / "tokenizer.json").read_bytes(), 0)
    counts = np.load(prepared / "bigrams.npy") + 1.0
    tokens = splits.validation.take(np.arange(3))["tokens"]
    found = splits.collate({"tokens": tokens})["baseline_bits"].double()
    for row, bits in zip(tokens.tolist(), found, strict=True):
        text = b"".join(spelled[token] for token in row)
        start = len(spelled[row[0]])
        wanted = sum(
            -math.log2(counts[a, b] / counts[a].sum()) for a, b in zip(text[start - 1 :], text[start:], strict=False)
        )
        assert bits.sum().item() == pytest.approx(wanted, rel=1e-5)
        assert bits[0] == 0


def test_another_block_or_vocabulary_in_the_same_folder_is_refused(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"prepared with block=32 vocab=400, not block=64 vocab=400; set data\.path"):
        subwords.stdlib_subwords(str(prepared), block=64, vocab=400)
    with pytest.raises(DataError, match="not block=32 vocab=512"):
        subwords.stdlib_subwords(str(prepared), block=32, vocab=512)
    with pytest.raises(ConfigError, match=r"data\.vocab=200"):
        subwords.stdlib_subwords(str(prepared), block=32, vocab=200)


def test_the_most_common_label_is_counted_on_training_samples_alone() -> None:
    labels = np.array([2, 2, 2, 1, 1, 0])
    assert most_common(labels, np.array([0, 3, 4, 5])).tolist() == [1] * 6
    assert torch.from_numpy(most_common(labels, np.arange(6))).tolist() == [2] * 6
