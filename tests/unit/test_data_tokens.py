"""Documents become tokens, and tokens blocks: all of them, in order, with their boundaries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.tokenizers import Packer, Tokens, open_tokenizer
from everstep.errors import ConfigError
from support.preparation import SMALL, lines, read


@given(st.lists(st.lists(st.integers(1, 255), max_size=9), max_size=8), st.integers(2, 7), st.integers(1, 4))
def test_packed_blocks_are_the_documents_with_separators_and_nothing_else(
    documents: list[list[int]], width: int, step: int
) -> None:
    packer = Packer(width, 0, np.dtype(np.uint8))
    out: list[int] = []
    for start in range(0, len(documents), step):
        part = documents[start : start + step]
        offsets = np.cumsum([0, *map(len, part)])
        values = np.array([token for document in part for token in document], np.uint8)
        out += packer.add(Tokens(values, offsets))["tokens"].combine_chunks().flatten().to_pylist()
    assert out + packer.tail.tolist() == [token for document in documents for token in (*document, 0)]
    assert len(packer.tail) < width


def test_tails_of_units_are_packed_together_so_that_less_than_a_block_is_left_out(tmp_path: Path) -> None:
    texts = lines(tmp_path / "source")
    options = PrepareOptions(
        src=[str(tmp_path / "source")], dst=str(tmp_path / "set"), tokenizer="bytes", pack=999, **SMALL
    )
    index = prepare(options)[""]
    stream = "".join(f"{text}\0" for text in texts)
    blocks = read(tmp_path / "set")["tokens"].combine_chunks().flatten()
    assert index.rows == len(stream) // 1000
    assert index.attributes["left_out_tokens"] == len(stream) % 1000
    assert index.attributes["separator"] == 0
    assert sorted(bytes(blocks.to_pylist()).split(b"\0"))[-1] in stream.encode()


MINE = """
def mine():
    ranks = {bytes([n]): n for n in range(256)} | {b"ab": 256, b"abab": 257}
    return {"name": "mine", "pat_str": r".+", "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 258}}
ENCODING_CONSTRUCTORS = {"mine": mine}
"""


@pytest.mark.process
def test_an_encoding_of_tiktoken_gives_its_tokens_and_its_end_of_text(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken: tokenizers need the package tiktoken, and it is not installed")
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "mine.py").write_text(MINE)  # how tiktoken finds encodings of others
    (tmp_path / "x.txt").write_text("ababab\nc\n")
    words = ["src=x.txt", "dst=set", "tokenizer=tiktoken:mine", "pack=3"]
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-m", "everstep.trainer", "data", "prepare", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}, check=True, timeout=60,
    )  # fmt: skip
    assert read(tmp_path / "set")["tokens"].to_pylist() == [[257, 256, 258, ord("c")]]
    index = ShardIndex.read(str(tmp_path / "set"))
    assert index.columns["tokens"].type == "uint16"
    assert (index.attributes["separator"], index.attributes["left_out_tokens"]) == (258, 1)


def test_an_unknown_encoding_of_tiktoken_is_one_line() -> None:
    pytest.importorskip("tiktoken", reason="tiktoken: tokenizers need the package tiktoken, and it is not installed")
    with pytest.raises(ConfigError, match=r"tokenizer=tiktoken:nope: there is no such encoding; there are .*gpt2"):
        open_tokenizer("tiktoken:nope", None)


def test_a_local_tokenizer_json_gives_its_tokens_and_its_end_of_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="hf: tokenizers need the package tokenizers, not installed")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("a b\nb c a\n")
    src, name = [str(tmp_path / "x.txt")], f"hf:{tmp_path}"
    index = prepare(PrepareOptions(src=src, dst=str(tmp_path / "packed"), tokenizer=name, pack=2))[""]
    assert read(tmp_path / "packed")["tokens"].to_pylist() == [[0, 1, 3], [1, 2, 0]]
    assert (index.attributes["separator"], index.attributes["vocab"]) == (3, 4)
    assert index.attributes["left_out_tokens"] == 1
    prepare(PrepareOptions(src=src, dst=str(tmp_path / "ragged"), tokenizer=name))
    assert read(tmp_path / "ragged")["tokens"].to_pylist() == [[0, 1], [1, 2, 0]]
    with pytest.raises(ConfigError, match="no token '<end>'; set separator="):
        open_tokenizer(name, "<end>")
