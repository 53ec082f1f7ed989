"""Preparing again: what is done stays, what changed starts anew, what is there is added to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare, work_unit
from everstep.dataset.prepare.options import PrepareOptions
from everstep.dataset.verify import verify
from everstep.errors import DataError
from support.preparation import SMALL, contents, lines, read


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


@pytest.mark.parametrize("validation", [0, 0.3])
def test_the_same_commands_again_find_their_work_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], validation: float
) -> None:
    lines(tmp_path / "source")
    dst, options = tmp_path / "set", {"validation": validation, **SMALL}
    first = PrepareOptions(src=[f"{tmp_path}/source/0.txt"], dst=str(dst), **options)
    more = PrepareOptions(src=[f"{tmp_path}/source/[12].txt"], dst=str(dst), append=True, **options)
    made = [prepare(first), prepare(more)][-1]
    before = contents(dst)
    for _ in range(2):  # as a job script does when it is requeued
        assert prepare(first, show=True) == prepare(more, show=True) == made
    assert contents(dst) == before
    assert capsys.readouterr().err.count("holds this source already") == 4


def test_the_same_command_for_a_source_that_changed_is_refused_and_says_why(tmp_path: Path) -> None:
    lines(tmp_path / "source")
    options = PrepareOptions(src=[str(tmp_path / "source")], dst=str(tmp_path / "set"))
    prepare(options)
    (tmp_path / "source" / "0.txt").write_text("changed\n")
    with pytest.raises(DataError, match="is a dataset already, of another source or prepared in another way"):
        prepare(options)


def test_a_dataset_tells_of_all_that_was_added_to_it(tmp_path: Path) -> None:
    lines(tmp_path / "source")
    dst, names = str(tmp_path / "set"), [f"{tmp_path}/source/{number}.txt" for number in range(3)]
    for number, name in enumerate(names):
        prepare(PrepareOptions(src=[name], dst=dst, append=number > 0, tokenizer="bytes", pack=50))
    attributes = ShardIndex.read(dst).attributes
    assert attributes["src"] == names
    assert attributes["files"] == 3
    stored = sum(os.path.getsize(name) for name in names)
    assert ShardIndex.read(dst).rows * 51 + attributes["left_out_tokens"] == stored


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
    whole, begun = work_unit.write_unit, iter(range(10**6))

    def breaks(*args: Any) -> Any:
        if next(begun) >= units:
            raise Stopped
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everstep.dataset.prepare.engine.write_unit", breaks)
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
            patch.setattr("everstep.dataset.prepare.ledger.Ledger.end", stop)
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
    with pytest.raises(DataError, match=r"is a dataset already.* choose another dst, append=true, or remove it"):
        prepare(PrepareOptions(src=src, dst=str(tmp_path / "set"), columns=["text"], shard_mib=1))
    with pytest.raises(DataError, match="is no prepared dataset"):
        prepare(PrepareOptions(src=src, dst=str(tmp_path / "source")))
    assert contents(tmp_path / "set") == before
