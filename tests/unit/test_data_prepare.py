"""Preparing: whole or absent, the same bytes everywhere, and a damaged shard is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare_blocks
from everstep.dataset.verify import verify
from everstep.errors import ConfigError, DataError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.stdlib_corpus import stdlib_corpus, stdlib_sources


def documents(count: int = 20, size: int = 40) -> list[tuple[str, bytes]]:
    return [(f"file{n}", bytes([1 + n]) * (size + n)) for n in range(count)]


def test_blocks_are_the_documents_joined_by_zero_bytes_and_held_out_by_file(tmp_path: Path) -> None:
    dst = tmp_path / "set"
    prepare_blocks(documents(), str(dst), 16, validation_every=5, shard_bytes=100)
    contents = [content for _, content in documents()]
    for split, chosen in (
        ("train", [c for n, c in enumerate(contents, 1) if n % 5]),
        ("validation", contents[4::5]),
    ):
        data = ArrowDataset(str(dst / split))
        stream = b"".join(content + b"\0" for content in chosen)
        tokens = data.take(np.arange(len(data)))["tokens"].numpy()
        assert tokens.shape == (len(stream) // 17, 17)
        assert tokens.tobytes() == stream[: tokens.size]
        assert len(data.index.shards) == -(-len(data) // (100 // 17))
        assert data.index.attributes["pack"] == 16


def test_the_same_documents_give_the_same_digest_and_one_changed_byte_another(tmp_path: Path) -> None:
    digests = []
    for name, change in (("a", b""), ("b", b""), ("c", b"x")):
        changed = [(n, change + content[len(change) :]) for n, content in documents()]
        prepare_blocks(changed, str(tmp_path / name), 16, validation_every=5)
        digests.append(ArrowDataset(str(tmp_path / name / "train")).digest)
    assert digests[0] == digests[1] != digests[2]


def test_of_two_that_prepare_at_once_the_second_waits_and_finds_it_ready(tmp_path: Path) -> None:
    dst = str(tmp_path / "set")
    errors: list[BaseException] = []
    read: list[str] = []

    def prepare(who: str) -> None:
        def told() -> Iterator[tuple[str, bytes]]:
            read.append(who)
            yield from documents()

        try:
            prepare_blocks(told(), dst, 16, validation_every=5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(read) == 1
    assert verify(dst) == []
    assert sorted(os.listdir(dst)) == ["train", "validation"]


def test_a_preparation_that_fails_is_no_dataset_and_the_next_one_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, bytes]]:
        yield from documents(3)
        raise OSError("disk full")

    dst = tmp_path / "set"
    with pytest.raises(OSError, match="disk full"):
        prepare_blocks(broken(), str(dst), 16, shard_bytes=17)
    assert not list(dst.rglob("index.json"))
    prepare_blocks(documents(), str(dst), 16, validation_every=5)
    assert verify(str(dst)) == []
    assert sorted(os.listdir(dst)) == ["train", "validation"]
    assert sorted(os.listdir(dst / "train")) == ["index.json", "shard-000000-000.arrow"]


def test_verify_names_the_damaged_the_torn_and_the_missing_shard(tmp_path: Path) -> None:
    dst = tmp_path / "set"
    prepare_blocks(documents(), str(dst), 16, validation_every=5, shard_bytes=100)
    assert verify(str(dst)) == []
    shards = sorted((dst / "train").glob("*.arrow"))
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    shards[3].write_bytes(shards[3].read_bytes()[:-1])
    shards[4].unlink()
    found = verify(str(dst))
    assert [str(line).split()[0] for line in found] == [str(shards[n]) for n in (1, 3, 4)]
    assert verify(str(dst / "validation")) == []


def test_a_folder_without_an_index_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no dataset: it has no index\.json"):
        ArrowDataset(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no prepared dataset"):
        prepare_blocks(documents(), str(tmp_path), 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "damaged"),
        (lambda text: json.dumps({**json.loads(text), "format": 9}), "format 9"),
        (
            lambda text: json.dumps({**json.loads(text), "digest": "0" * 64}),
            "its digest does not match its own list of shards",
        ),
        (lambda text: text.replace('"rows"', '"lines"'), "damaged"),
        (lambda text: "[]", "damaged"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(tmp_path: Path, change: object, words: str) -> None:
    prepare_blocks(documents(), str(tmp_path / "set"), 16, validation_every=5)
    index = tmp_path / "set" / "train" / "index.json"
    index.write_text(change(index.read_text()))  # type: ignore[operator]
    with pytest.raises(DataError, match=words) as caught:
        ShardIndex.read(str(tmp_path / "set" / "train"))
    assert "\n" not in str(caught.value)


def test_an_index_reads_back_as_it_was_written(tmp_path: Path) -> None:
    prepare_blocks(documents(), str(tmp_path / "set"), 16, validation_every=5, shard_bytes=100)
    index = ShardIndex.read(str(tmp_path / "set" / "train"))
    (tmp_path / "copy").mkdir()
    index.write(str(tmp_path / "copy"))
    assert ShardIndex.read(str(tmp_path / "copy")) == index
    assert os.listdir(tmp_path / "copy") == ["index.json"]


def test_too_little_to_hold_anything_out_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no validation block of 17 tokens"):
        prepare_blocks(documents(3), str(tmp_path / "set"), 16)
    with pytest.raises(ConfigError, match="block=0"):
        prepare_blocks(documents(), str(tmp_path / "set"), 0)
    with pytest.raises(ConfigError, match="validation_every=1"):
        prepare_blocks(documents(), str(tmp_path / "set"), 8, validation_every=1)


def test_the_stdlib_corpus_is_prepared_once_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.trainer.data.stdlib_corpus.stdlib_sources", lambda: iter(documents(40)))
    path = str(tmp_path / "deep" / "stdlib")
    first = stdlib_corpus(path, block=16)
    monkeypatch.setattr("everstep.trainer.data.stdlib_corpus.stdlib_sources", lambda: pytest.fail("prepared again"))
    again = stdlib_corpus(path, block=16)
    assert first.train.digest == again.train.digest
    with pytest.raises(DataError, match="prepared with block=16, not 32"):
        stdlib_corpus(path, block=32)


def test_the_stdlib_sources_are_sorted_and_hold_no_tests() -> None:
    names = [name for name, _ in stdlib_sources()]
    assert names == sorted(names)
    assert {"ast.py", os.path.join("json", "decoder.py")} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split(os.sep)) for name in names)


@pytest.mark.process
def test_the_parser_needs_neither_numpy_nor_pyarrow_and_preparing_no_torch() -> None:
    script = (
        "import sys, everstep.trainer.data.cli; assert not {'numpy', 'pyarrow', 'torch'} & set(sys.modules)\n"
        "import everstep.trainer.data.ordering.order, everstep.dataset.prepare; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
