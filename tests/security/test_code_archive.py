"""The archive of a job's code takes bounded memory and room, whatever it says of itself (1.25)."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from everstep.errors import StorageError
from everstep.launch.submit import code_archive, snapshot
from everstep.launch.submit.code_archive import SnapshotError, SnapshotFile, digest_of, pack
from everstep.launch.submit.snapshot import unpack
from everstep.run_folder import RunFolder
from support.tar_archives import info, tar


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "elsewhere" / "r"))


def test_1_25_an_archive_that_unpacks_to_much_is_broken_off_without_the_memory(run: RunFolder, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as stream:
        head = info("zeros")
        head.size = 3 << 30
        stream.write(head.tobuf())
        for _ in range(1200):
            stream.write(bytes(1 << 20))
    run.storage.write(snapshot.archive("d"), packed.getvalue())
    code = (
        "import resource, sys; from pathlib import Path; from everstep.launch.submit import snapshot\n"
        "from everstep.run_folder import RunFolder\n"
        "import blake3\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: snapshot.unpack(RunFolder(sys.argv[1]), 'd', Path(sys.argv[2]))\n"
        "except snapshot.SnapshotError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    argv = [sys.executable, "-c", code, run.url, str(tmp_path / "node")]
    said, grown_mb = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "unpacks to more than 1000 MB" in said
    assert int(grown_mb) < 64
    assert list((tmp_path / "node").iterdir()) == []


def pax(size: int) -> bytes:
    """An archive whose extended header says that it has that many bytes."""
    head = info("x", tarfile.XHDTYPE)
    head.size = size
    return gzip.compress(head.tobuf() + bytes(4 << 20))


def test_1_25_a_header_says_not_how_much_is_read_at_once(run: RunFolder, tmp_path: Path) -> None:
    run.storage.write(snapshot.archive("d"), pax(2 << 20))
    with pytest.raises(SnapshotError, match="has a header of 2097152 bytes"):
        unpack(run, "d", tmp_path / "node")


def test_1_25_files_that_are_mostly_holes_count_in_full(run: RunFolder, tmp_path: Path) -> None:
    sparse = info("holes")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "holes",
                          "GNU.sparse.size": str(1 << 40), "GNU.sparse.numblocks": "0"}  # fmt: skip
    run.storage.write(snapshot.archive("d"), tar(sparse))
    with pytest.raises(SnapshotError, match="unpacks to more than 1000 MB"):
        unpack(run, "d", tmp_path / "node")


def test_1_25_the_number_of_files_has_a_limit(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_archive, "MOST_MEMBERS", 2)
    run.storage.write(snapshot.archive("d"), pack([SnapshotFile(name, b"") for name in "abc"]))
    with pytest.raises(SnapshotError, match="more than 2 files"):
        unpack(run, "d", tmp_path / "node")


def test_a_job_that_takes_more_code_unpacks_as_much(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "UNPACKED_LIMIT_MB", 1)
    members = [SnapshotFile("a", bytes(3_000_000))]
    run.storage.write(snapshot.archive(digest_of(members)), pack(members))
    with pytest.raises(SnapshotError, match="unpacks to more than 1 MB"):
        unpack(run, digest_of(members), tmp_path / "node", 0.5)
    assert unpack(run, digest_of(members), tmp_path / "node", 2).is_dir()


def test_a_member_that_comes_twice_or_out_of_order_is_refused(run: RunFolder, tmp_path: Path) -> None:
    for names in (("a", "a"), ("b", "a")):
        run.storage.write(snapshot.archive("d"), tar(*map(info, names)))
        with pytest.raises(SnapshotError, match="out of order"):
            unpack(run, "d", tmp_path / "node")


def test_a_fifo_in_place_of_an_archive_is_refused_and_not_waited_for(run: RunFolder, tmp_path: Path) -> None:
    place = Path(run.url) / snapshot.archive("d")
    place.parent.mkdir(parents=True)
    os.mkfifo(place)
    with pytest.raises(StorageError, match=r"cannot read .*: it is no regular file; remove it$"):
        unpack(run, "d", tmp_path / "node")
