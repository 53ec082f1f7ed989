"""Damage is named by shard and part, and mended from a copy only with what was verified."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare_arrays
from everstep.dataset.verify import verify
from everstep.trainer.command import verb

SHARD_MIB = 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "set"
    tokens = np.random.default_rng(0).integers(0, 2**16, (130_000, 128), dtype=np.uint16)
    prepare_arrays({"tokens": tokens}, str(folder), shard_mib=SHARD_MIB)
    return folder


def broken(whole: Path, folder: Path) -> list[str]:
    """A copy with one shard missing, one short and one with a flipped bit in part 1."""
    shutil.copytree(whole, folder)
    shards = [folder / shard.file for shard in ShardIndex.read(str(folder)).shards]
    assert len(shards) == 4
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    content = bytearray(shards[2].read_bytes())
    content[5 << 20] ^= 1
    shards[2].write_bytes(content)
    return [str(shard) for shard in shards]


def test_every_bad_shard_is_named_with_what_is_wrong(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = broken(whole, tmp_path / "copy")
    first, second, third = verify(str(tmp_path / "copy"))
    assert str(first) == f"{shards[0]} is missing"
    assert str(second).startswith(f"{shards[1]} is ")
    assert "bytes where the index says" in str(second)
    assert str(third) == f"{shards[2]} is damaged: part 1 of 3 does not match its digest"
    assert verb(["data", "verify", str(tmp_path / "copy")]) == 2
    said = capsys.readouterr().err
    assert "3 of 4 shards are bad" in said
    assert "--repair-from" in said
    assert said.count("\n") == 1


def test_good_shards_come_from_a_copy(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    broken(whole, copy)
    assert verb(["data", "verify", str(copy), "--repair-from", str(whole)]) == 0
    assert capsys.readouterr().out.count("mended") == 3
    assert verify(str(copy)) == []
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_what_is_damaged_there_too_is_not_taken(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = broken(whole, tmp_path / "copy")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "copy", other)
    shutil.copy(whole / Path(shards[0]).name, other)
    before = Path(shards[2]).read_bytes()
    assert verb(["data", "verify", str(tmp_path / "copy"), "--repair-from", str(other)]) == 2
    printed = capsys.readouterr()
    assert "not mended" in printed.out
    assert "is damaged too: part 1" in printed.out
    assert "2 of 4 shards are still bad" in printed.err
    assert Path(shards[2]).read_bytes() == before
    assert len(verify(str(tmp_path / "copy"))) == 2


def test_a_dataset_in_a_store_is_verified_and_mended(whole: Path, tmp_path: Path, s3: str) -> None:
    import fsspec

    store = fsspec.filesystem("s3")
    broken(whole, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        store.put_file(str(path), f"{s3}/verified/{path.name}")
    assert [damage.what.split()[1] for damage in verify(f"{s3}/verified")] == [
        "missing",
        *verify_sizes(tmp_path),
        "damaged:",
    ]
    assert verb(["data", "verify", f"{s3}/verified", "--repair-from", str(whole)]) == 0
    assert verify(f"{s3}/verified") == []
    assert verb(["data", "verify", str(tmp_path / "copy"), "--repair-from", f"{s3}/verified"]) == 0


def verify_sizes(tmp_path: Path) -> list[str]:
    file = ShardIndex.read(str(tmp_path / "copy")).shards[1].file
    return [str((tmp_path / "copy" / file).stat().st_size)]


def test_an_unfinished_preparation_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set" / ".prepare").mkdir(parents=True)
    (tmp_path / "set" / ".prepare" / "plan.json").write_text("{}")
    assert verb(["data", "inspect", str(tmp_path / "set")]) == 2
    assert "is not finished: give the same `everstep data prepare` again" in capsys.readouterr().err
