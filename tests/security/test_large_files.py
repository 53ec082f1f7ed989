"""Files with holes and links in a run folder: no verb reads them whole, or reads a file outside of the folder."""

from __future__ import annotations

import base64
import json
import os
import resource
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.config import RunConfig
from everstep.errors import EverstepError, StorageError
from everstep.frozen_config import freeze, thaw
from everstep.launch.cli.logs import logs
from everstep.launch.cli.status import status
from everstep.run_folder import RunFolder
from everstep.storage import LocalStorage, lines, start_of_last
from everstep.storage.base import BLOCK_BYTES, LONGEST_LINE
from everstep.trainer.checkpoint.manifest import Damaged, candidates
from everstep.trainer.data.ordering.data_record import DataRecord, read_record, write_record

HOLES = 64 << 30
PEAK = 64 << 20
RECORD = {"place": "digits", "digest": "ab", "share": "1", "rows": [8]}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = tmp_path / "run"
    (folder / "attempts" / "0001").mkdir(parents=True)
    (folder / "config.yaml").write_text(freeze(RunConfig(run="run")))
    (folder / "attempts/0001/claim.json").write_text('{"time": 1.7e9, "host": "elsewhere", "pid": 5, "world": 1}')
    return RunFolder(str(folder))


@pytest.fixture
def bounded() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAK


@pytest.fixture(autouse=True)
def no_more_memory() -> Iterator[None]:
    """Limit the memory of this process, so that a read of a whole file fails and the machine goes on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def with_holes(folder: RunFolder, name: str) -> None:
    path = Path(folder.url) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(HOLES)


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "progress.json", "job.yaml"])
def test_a_file_with_holes_is_refused_before_it_is_read(run: RunFolder, bounded: None, name: str) -> None:
    with_holes(run, name)
    with pytest.raises(StorageError, match=rf"{name}: it has {HOLES} bytes \(limit"):
        run.storage.read(name)


def test_an_outcome_with_holes_counts_as_none(run: RunFolder, bounded: None) -> None:
    with_holes(run, "attempts/0001/outcome.json")
    assert run.ending(1) is None


def test_a_manifest_with_holes_is_damage_and_the_older_checkpoint_is_next(run: RunFolder, bounded: None) -> None:
    with_holes(run, "checkpoints/step-00000020-attempt-0001/manifest.json")
    (found,) = candidates(run)
    assert isinstance(found, Damaged)
    assert not found.refused


def test_the_end_of_a_log_is_read_and_not_its_beginning(
    run: RunFolder, bounded: None, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with_holes(run, "attempts/0001/rank-0000.log")
    with (Path(run.url) / "attempts/0001/rank-0000.log").open("ab") as log:
        log.write(b"\none\ntwo\nthree\n")
    assert logs([run.url, "--tail", "2"]) == 0
    assert capfdbinary.readouterr().out == b"two\nthree\n"
    assert status([run.url]) == 0


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_last_lines_are_found_across_blocks(tmp_path: Path, end: bytes) -> None:
    text = [b"x" * length for length in (3, BLOCK_BYTES, 5, 0, BLOCK_BYTES // 2)]
    data = b"\n".join(text) + end
    (tmp_path / "log").write_bytes(data)
    for count in range(1, 6):
        expected = b"\n".join(text[-count:]) + end
        assert data[start_of_last(LocalStorage(str(tmp_path)), "log", count) :] == expected
    assert start_of_last(LocalStorage(str(tmp_path)), "log", 9) == 0
    assert start_of_last(LocalStorage(str(tmp_path)), "log", 0) == len(data)


def test_lines_come_whole_from_blocks_without_those_that_are_no_record(tmp_path: Path) -> None:
    long = b"y" * (LONGEST_LINE + 1)
    short = [b"%d" % number * 1000 for number in range(2000)]
    (tmp_path / "log").write_bytes(b"\n".join([*short, long, b"a", b"z" * 3 * BLOCK_BYTES, b"b"]))
    assert list(lines(LocalStorage(str(tmp_path)), "log")) == [*short, b"a", b"b"]


@pytest.mark.parametrize("name", ["attempts/0001/rank-0000.log", "attempts/0001/outcome.json"])
def test_a_record_or_log_that_is_a_link_out_of_the_folder_is_not_read(
    run: RunFolder, tmp_path: Path, name: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "private").write_text("PLANTED")
    os.symlink(tmp_path / "private", Path(run.url) / name)
    with pytest.raises(StorageError, match=r"is a link to .*private, outside of"):
        run.storage.read(name)
    with pytest.raises(StorageError, match="outside of"):
        logs([run.url]) if name.endswith("log") else status([run.url])
    assert b"PLANTED" not in b"".join(capfdbinary.readouterr())


def test_a_link_that_stays_in_the_folder_is_read(run: RunFolder) -> None:
    os.symlink("claim.json", Path(run.url) / "attempts/0001/same.json")
    assert run.storage.read("attempts/0001/same.json")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_trackers_write_through_no_link(run: RunFolder, tmp_path: Path, name: str) -> None:
    os.symlink(tmp_path, Path(run.url) / name)
    with pytest.raises(EverstepError, match=f"{name} is a link to"):
        _ = RunFolder(run.url).storage


SOURCES = [
    {**RECORD, "share": "a half"}, {**RECORD, "share": "1/0"}, {**RECORD, "share": "-1"}, {**RECORD, "rows": ["8"]},
    {**RECORD, "rows": 8}, {**RECORD, "rows": [-8]}, {**RECORD, "place": 5}, {**RECORD, "files": ["a", "b"]},
    {**RECORD, "files": [["a"]]}, {**RECORD, "weights": "eJw="}, {**RECORD, "weights": 5}, {**RECORD, "more": 1}, [], 5,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_a_record_of_the_data_that_everstep_did_not_write_is_one_line(run: RunFolder, source: object) -> None:
    (Path(run.url) / "data.json").write_text(json.dumps({"sources": [source]}))
    with pytest.raises(EverstepError, match=r"data\.json is damaged"):
        read_record(run)


def test_brackets_without_end_in_the_record_of_the_data_are_one_line(run: RunFolder) -> None:
    (Path(run.url) / "data.json").write_text("[" * 300_000)
    with pytest.raises(EverstepError, match="nested too deeply"):
        read_record(run)


def test_weights_inflate_to_no_more_than_their_samples(run: RunFolder, bounded: None) -> None:
    packer = zlib.compressobj(9)
    bomb = base64.b64encode(b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()).decode()
    write_record(run, [DataRecord(**RECORD, weights=bomb)])  # type: ignore[arg-type]
    with pytest.raises(EverstepError, match="not those of 8 samples"):
        read_record(run)


def test_a_config_that_is_no_text_is_one_line() -> None:
    with pytest.raises(EverstepError, match=r"config\.yaml of the run folder"):
        thaw(bytes(range(256)))
