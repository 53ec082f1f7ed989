"""What preparing promises of any source: the same bytes however it is done, nothing lost, nothing twice."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_sources import read

from trainer.data import unit
from trainer.data.cleaning import first_ones, row_digests
from trainer.data.index import ShardIndex
from trainer.data.options import FORMATS, KEYS, PrepareOptions, parse
from trainer.data.packing import Packer
from trainer.data.prepare import prepare, prepare_arrays, prepare_rows
from trainer.data.tokenizers import Tokens, open_tokenizer
from trainer.data.verify import verify
from trainer.errors import ConfigError, DataError


def lines(folder: Path, count: int = 400, files: int = 3) -> list[str]:
    """Write `count` lines into some files; the lines in order."""
    folder.mkdir(exist_ok=True)
    draws = random.Random(1)
    texts = [f"{n} " + "x" * draws.randint(0, 60) for n in range(count)]
    for number in range(files):
        part = texts[number * count // files : (number + 1) * count // files]
        (folder / f"{number}.txt").write_text("".join(f"{text}\n" for text in part))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SMALL = {"shard_mib": 2 / 1024}
"""2 kB: some twenty units of some shards."""


@pytest.mark.process
@pytest.mark.parametrize(
    "options",
    [{}, {"validation": 0.2}, {"dedup": True}, {"tokenizer": "bytes", "pack": 32, "validation": 0.3}],
    ids=["rows", "split", "dedup", "packed"],
)
def test_the_dataset_does_not_depend_on_the_number_of_processes(tmp_path: Path, options: dict[str, Any]) -> None:
    lines(tmp_path / "source")
    for processes in (1, 3):
        dst = str(tmp_path / f"set{processes}")
        prepare(PrepareOptions(src=[str(tmp_path / "source")], dst=dst, processes=processes, **SMALL, **options))
    assert contents(tmp_path / "set1") == contents(tmp_path / "set3")
    assert not (tmp_path / "set1" / ".prepare").exists()


def test_samples_fall_to_the_same_side_whatever_their_order_and_files(tmp_path: Path) -> None:
    texts = lines(tmp_path / "source")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "all.txt").write_text("\n".join(reversed(texts)))
    sides = []
    for source in ("source", "other"):
        dst = tmp_path / f"set-{source}"
        prepare(PrepareOptions(src=[str(tmp_path / source)], dst=str(dst), validation=0.25, **SMALL))
        sides.append({split: sorted(read(dst, split)["text"].to_pylist()) for split in ("train", "validation")})
    assert sides[0] == sides[1]
    assert sorted(sides[0]["train"] + sides[0]["validation"]) == sorted(texts)
    assert 60 < len(sides[0]["validation"]) < 140


def test_the_key_decides_the_side_and_need_not_be_stored(tmp_path: Path) -> None:
    users = [f"user{n % 20}" for n in range(400)]
    pq.write_table(pa.table({"user": users, "n": list(range(400))}), tmp_path / "x.parquet")
    options = PrepareOptions(
        src=[str(tmp_path / "x.parquet")], dst=str(tmp_path / "set"), columns=["n"], key="user", validation=0.3
    )
    prepare(options)
    parts = [{users[n] for n in read(tmp_path / "set", split)["n"].to_pylist()} for split in ("train", "validation")]
    assert parts[0] & parts[1] == set()
    assert parts[0] | parts[1] == set(users)
    assert read(tmp_path / "set", "train").column_names == ["n"]


@given(st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=5))
def test_of_equal_contents_the_first_in_source_order_stays(units: list[list[int]]) -> None:
    digests = [row_digests(pa.table({"n": pa.array(values, pa.int64())}), ["n"]) for values in units]
    kept = [value for values, mask in zip(units, first_ones(digests), strict=True)
            for value, keep in zip(values, mask, strict=True) if keep]  # fmt: skip
    assert kept == list(dict.fromkeys(value for values in units for value in values))


ANY_ROWS = st.lists(st.tuples(st.integers(-5, 5), st.binary(max_size=5), st.lists(st.integers(0, 9), max_size=3)))


@given(ANY_ROWS, st.data())
def test_a_digest_is_that_of_the_content_wherever_it_lies(rows: list[tuple[int, bytes, list[int]]], data: Any) -> None:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    kinds = (pa.int64(), pa.large_binary(), pa.large_list(pa.int64()))
    table = pa.table({str(n): pa.array(c, k) for n, (c, k) in enumerate(zip(columns, kinds, strict=True))})
    start = data.draw(st.integers(0, len(rows)))
    for names in (["0"], ["1"], ["2"], ["0", "1", "2"]):
        whole, part = row_digests(table, names), row_digests(table.slice(start), names)
        assert (whole[start:] == part).all()
        values = table.select(names).to_pylist()
        same = [[a == b for a in values] for b in values]
        assert same == [[(a == b).all() for a in whole] for b in whole]


def test_dedup_looks_at_all_units_and_at_documents_when_they_are_tokenised(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    texts = [f"text {n % 150}" for n in range(400)]
    for number in range(4):
        (tmp_path / "source" / f"{number}.txt").write_text("\n".join(texts[number * 100 : number * 100 + 100]))
    src = [str(tmp_path / "source")]
    prepare(PrepareOptions(src=src, dst=str(tmp_path / "rows"), dedup=True, **SMALL))
    assert read(tmp_path / "rows")["text"].to_pylist() == list(dict.fromkeys(texts))
    prepare(PrepareOptions(src=src, dst=str(tmp_path / "tokens"), dedup=True, tokenizer="bytes", **SMALL))
    tokens = read(tmp_path / "tokens")["tokens"].to_pylist()
    assert [bytes(document).decode() for document in tokens] == list(dict.fromkeys(texts))


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
        [sys.executable, "-m", "trainer", "data", "prepare", *words],
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


def test_append_leaves_old_shards_as_they_are_and_adds_new_samples(tmp_path: Path) -> None:
    texts = lines(tmp_path / "source")
    src, dst = str(tmp_path / "source"), tmp_path / "set"
    prepare(PrepareOptions(src=[f"{src}/0.txt"], dst=str(dst), **SMALL))
    before = {name: content for name, content in contents(dst).items() if name != "index.json"}
    prepare(PrepareOptions(src=[f"{src}/[12].txt"], dst=str(dst), append=True, **SMALL))
    after = contents(dst)
    assert {name: after[name] for name in before} == before
    assert read(dst)["text"].to_pylist() == texts
    assert verify(str(dst)) == []


def test_append_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    lines(tmp_path / "source")
    src, dst = [str(tmp_path / "source")], str(tmp_path / "set")
    with pytest.raises(DataError, match=r"append=true: .* is no dataset yet"):
        prepare(PrepareOptions(src=src, dst=dst, append=True))
    prepare(PrepareOptions(src=src, dst=dst, tokenizer="bytes", pack=16))
    for other, said in (
        ({}, r"has columns tokens uint8\[17\], src gives text str"),
        ({"tokenizer": "bytes", "pack": 32}, r"src gives tokens uint8\[33\]"),
        ({"tokenizer": "bytes", "pack": 16, "separator": "\n"}, "separator=0, now separator=10"),
    ):
        with pytest.raises(DataError, match=said):
            prepare(PrepareOptions(src=src, dst=dst, append=True, **other))  # type: ignore[arg-type]
    assert verify(dst) == []
    assert not (tmp_path / "set" / ".prepare").exists()


class Stopped(Exception):
    """What breaks a preparation here."""


def broken_after(units: int, options: PrepareOptions) -> None:
    """A preparation that breaks when that many units are done."""
    whole, begun = unit.write_unit, iter(range(10**6))

    def breaks(*args: Any) -> Any:
        if next(begun) >= units:
            raise Stopped
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.prepare.write_unit", breaks)
        with pytest.raises(Stopped):
            prepare(options)


def test_a_restart_does_only_what_is_left(tmp_path: Path) -> None:
    lines(tmp_path / "source")
    options = PrepareOptions(src=[str(tmp_path / "source")], dst=str(tmp_path / "set"), processes=1, **SMALL)
    broken_after(3, options)
    done = sorted((tmp_path / "set").glob("shard-*"))
    times = [path.stat().st_mtime_ns for path in done]
    assert len({path.name[:12] for path in done}) == 3
    prepare(options)
    assert [path.stat().st_mtime_ns for path in done] == times


@pytest.mark.parametrize("validation", [0, 0.3])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("where", ["before the last index", "before the records go"])
def test_what_broke_at_its_very_end_is_completed_once(
    tmp_path: Path, where: str, append: bool, validation: float
) -> None:
    lines(tmp_path / "source")
    source, sets = str(tmp_path / "source"), (tmp_path / "broken", tmp_path / "whole")
    for dst in sets if append else ():
        prepare(PrepareOptions(src=[f"{source}/0.txt"], dst=str(dst), validation=validation, **SMALL))
    broken, whole = (
        PrepareOptions(src=[f"{source}/[12].txt"], dst=str(dst), validation=validation, append=append, **SMALL)
        for dst in sets
    )
    prepare(whole)
    with pytest.MonkeyPatch.context() as patch:
        if where == "before the records go":
            patch.setattr("trainer.data.ledger.Ledger.end", stop)
        else:
            patch.setattr(ShardIndex, "write", stop_at(2 if validation else 1, ShardIndex.write))
        with pytest.raises(Stopped):
            prepare(broken)
    prepare(broken)
    assert contents(sets[0]) == contents(sets[1])
    assert not (sets[0] / ".prepare").exists()


def stop(*args: Any) -> None:
    raise Stopped


def stop_at(number: int, work: Any) -> Any:
    calls = iter(range(1, 100))
    return lambda *args: stop() if next(calls) == number else work(*args)


@pytest.mark.parametrize("change", ["source", "options"])
def test_a_restart_after_a_change_starts_the_changed_units_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    texts = lines(tmp_path / "source")
    options: dict[str, Any] = {"src": [str(tmp_path / "source")], "dst": str(tmp_path / "set"), "processes": 1}
    broken_after(3, PrepareOptions(**options, **SMALL))
    if change == "source":
        (tmp_path / "source" / "0.txt").write_text("changed\n")
        texts[: len(texts) // 3] = ["changed"]
    prepare(PrepareOptions(**options, **(SMALL if change == "source" else {"shard_mib": 0.01})), show=True)
    assert f"the {change} changed since: 3 units" in capsys.readouterr().err
    assert read(tmp_path / "set")["text"].to_pylist() == texts
    index = ShardIndex.read(str(tmp_path / "set"))
    assert sorted(os.listdir(tmp_path / "set")) == ["index.json", *(shard.file for shard in index.shards)]


def test_a_ready_dataset_and_a_foreign_folder_are_not_touched(tmp_path: Path) -> None:
    lines(tmp_path / "source")
    src = [str(tmp_path / "source")]
    prepare(PrepareOptions(src=src, dst=str(tmp_path / "set")))
    before = contents(tmp_path / "set")
    with pytest.raises(DataError, match=r"is a dataset already; choose another dst, append=true, or remove it"):
        prepare(PrepareOptions(src=src, dst=str(tmp_path / "set")))
    with pytest.raises(DataError, match="is no prepared dataset"):
        prepare(PrepareOptions(src=src, dst=str(tmp_path / "source")))
    assert contents(tmp_path / "set") == before


def test_a_worker_that_dies_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os\ndef die(n, say):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly  # type: ignore[import-not-found]

    from trainer.data.crew import in_parallel

    with pytest.raises(DataError, match="a worker process ended with code 9"):
        list(in_parallel(deadly.die, [(1,), (2,)], 2, lambda rows, size: None))


NUMBERS = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=300)


@settings(max_examples=20)
@given(NUMBERS, st.integers(1, 200), st.sampled_from(["none", "lz4", "zstd"]))
def test_arrays_read_back_as_they_were_from_shards_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], size: int, compression: str
) -> None:
    dst = tmp_path_factory.mktemp("arrays") / "set"
    array = np.array(numbers, np.uint16)
    index = prepare_arrays({"n": array}, str(dst), shard_mib=size / 2**20, compression=compression)[""]
    assert read(dst)["n"].to_pylist() == numbers
    assert index.rows == len(numbers)


def test_rows_that_do_not_fit_the_first_are_bad(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"n": n} for n in range(2000))
        yield {"m": 1}
        yield {"n": "SECRET"}
        yield {"n": 2000}

    with pytest.raises(DataError, match="row 2001 has no column 'n': 2 bad so far, max_bad=0"):
        prepare_rows(rows, str(tmp_path / "set"))
    prepare_rows(rows, str(tmp_path / "set"), max_bad=2)
    assert read(tmp_path / "set")["n"].to_pylist() == list(range(2001))
    assert "SECRET" not in (tmp_path / "set" / "bad.jsonl").read_text()
    bad = (tmp_path / "set" / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in bad] == ["the rows: row 2001", "the rows: row 2002"]


def test_words_become_typed_options() -> None:
    options = parse(["src=[a,'b/**/*.txt']", "dst=D", "pack=8", "tokenizer=bytes", "dedup=true", "validation=0.1"])
    assert (options.src, options.pack, options.dedup, options.validation) == (["a", "b/**/*.txt"], 8, True, 0.1)
    assert parse(["src=*.txt", "dst=D", "columns=null"]).columns is None
    assert set(KEYS) == set(PrepareOptions.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dst=D"], "src= is missing"),
        (["src=a"], "dst= is missing"),
        (["src=a", "dst=D", "colums=[a]"], "no key 'colums'; did you mean 'columns'"),
        (["src=a", "dst=D", "--force"], "cannot read '--force': write key=value"),
        (["src=a", "src=b", "dst=D"], r"src is given twice; a list is src=\[a,b\]"),
        (["src=a", "dst=D", "pack=much"], "pack=much: .*could not be converted to Integer"),
        (["src=a", "dst=D", "pack=8"], "pack=8 cuts tokens: give tokenizer="),
        (["src=a", "dst=D", "format=parket"], "format=parket is none of .*did you mean 'parquet'"),
        (["src=a", "dst=D", "compression=gzip"], "compression=gzip is none of none, lz4, zstd"),
        (["src=a", "dst=D", "validation=1"], "validation=1 must be below 1"),
        (["src=a", "dst=D", "processes=0"], "processes=0 must be at least 1"),
        (["src=a", "dst=D", "tokenizer=bpe"], "tokenizer=bpe: write bytes, tiktoken:NAME"),
        (["src=a", "dst=D", "format=generator"], "src=a: with format=generator write package.module:function"),
        (["src=os:nope", "dst=D", "format=generator"], "src=os:nope cannot be imported"),
    ],
)
def test_what_is_mistyped_is_one_line_with_the_key_to_change(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        prepare(parse(words))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]


def test_the_page_on_data_knows_every_key_and_its_commands_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in (*KEYS, *FORMATS):
        assert f"`{name}`" in page, name
    commands = [line.split("#")[0] for line in page.splitlines() if line.startswith("    everstep data prepare")]
    assert len(commands) > 4
    for command in commands:
        parse(shlex.split(command)[3:])


@pytest.mark.process
def test_a_source_larger_than_the_memory_allowed_streams_through(tmp_path: Path) -> None:
    script = (
        "import resource, sys; import numpy as np; from trainer.data.prepare import prepare_rows\n"
        "prepare_rows(lambda: ({'n': n} for n in range(3)), sys.argv[1] + '/warm')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "row = np.zeros(1 << 20, np.uint8)\n"
        "prepare_rows(lambda: ({'x': row} for n in range(400)), sys.argv[1] + '/set', shard_mib=16)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200
    assert ShardIndex.read(str(tmp_path / "set")).rows == 400
