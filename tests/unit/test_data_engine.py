"""What preparing promises of any source: the same bytes however it is done, nothing lost, nothing twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare, prepare_arrays
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.prepare.schema_cast import first_ones, row_digests
from everstep.errors import DataError
from support.preparation import SMALL, contents, lines, read


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


def test_a_worker_that_dies_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os\ndef die(n, say):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly  # type: ignore[import-not-found]

    from everstep.dataset.prepare.worker_pool import in_parallel

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


@pytest.mark.process
def test_a_source_larger_than_the_memory_allowed_streams_through(tmp_path: Path) -> None:
    script = (
        "import resource, sys; import numpy as np; from everstep.dataset.prepare import prepare_rows\n"
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
