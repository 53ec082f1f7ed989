"""Kill -9 a preparation at any time: what the next one makes is what an undisturbed one makes, to the byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare_blocks
from everstep.dataset.verify import verify
from support.processes import alive, until

pytestmark = pytest.mark.process
KINDS = {
    "rows": [],
    "split without duplicates": ["validation=0.2", "dedup=true"],
    "packed": ["tokenizer=bytes", "pack=100"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    draws = random.Random(3)
    for number in range(4):
        texts = [f"{draws.randint(0, 3000)} " + "y" * draws.randint(0, 300) for _ in range(3000)]
        (folder / f"{number}.txt").write_text("\n".join(texts))
    return folder


def start(source: Path, dst: str, words: list[str]) -> subprocess.Popen[bytes]:
    given = [f"src={source}", f"dst={dst}", "shard_mib=0.02", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "everstep.trainer", "data", "prepare", *given],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def digests(dst: Path) -> list[str]:
    return [ShardIndex.read(str(path.parent)).digest for path in sorted(dst.rglob("index.json"))]


def names(folder: Path) -> list[str]:
    return sorted(os.path.join(parent, name) for parent, _, files in os.walk(folder) for name in files)


def inside(folder: Path) -> list[str]:
    return [os.path.relpath(name, folder) for name in names(folder)]


def children(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_preparation_goes_on_to_the_same_dataset(tmp_path: Path, source: Path, kind: str) -> None:
    words = ["processes=2", *KINDS[kind]]
    assert start(source, str(tmp_path / "whole"), words).wait() == 0
    draws, dst = random.Random(kind), tmp_path / "broken"
    for _ in range(6):
        process = start(source, str(dst), words)
        least = len(names(dst)) + draws.randint(1, 14)
        until(lambda p=process, n=least: len(names(dst)) >= n or p.poll() is not None, 60)  # type: ignore[misc]
        workers = children(process.pid)
        process.kill()
        assert process.wait() == -9
        until(lambda workers=workers: not any(map(alive, workers)), 10)  # type: ignore[misc]
    assert start(source, str(dst), words).wait() == 0
    assert digests(dst) == digests(tmp_path / "whole") != []
    assert verify(str(dst)) == []
    assert inside(dst) == inside(tmp_path / "whole")


def test_what_was_killed_between_two_units_begins_with_the_next(tmp_path: Path, source: Path) -> None:
    dst = tmp_path / "set"
    process = start(source, str(dst), ["processes=1", "tokenizer=bytes", "pack=100"])
    until(lambda: len(list(dst.glob(".prepare/unit-*.json"))) >= 5, 60)
    process.kill()
    process.wait()
    noted = {path.name: path.stat().st_mtime_ns for path in dst.glob(".prepare/unit-*.json")}
    shards = {
        path.name: path.stat().st_mtime_ns for path in dst.glob("shard-*") if f"unit-{path.name[6:12]}.json" in noted
    }
    assert not (dst / "index.json").exists()
    assert start(source, str(dst), ["processes=2", "tokenizer=bytes", "pack=100"]).wait() == 0
    assert {name: (dst / name).stat().st_mtime_ns for name in shards} == shards
    assert verify(str(dst)) == []


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path, source: Path) -> None:
    dst = tmp_path / "set"
    process = start(source, str(dst), ["processes=2"])
    until(lambda: len(list(dst.glob(".prepare/unit-*.json"))) >= 3, 60)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert not any(map(alive, workers))
    assert process.stderr is not None
    assert process.stderr.read() == b"stopped; give the same command again to go on\n"
    again = start(source, str(dst), ["processes=2"])
    assert again.wait() == 0
    assert again.stderr is not None
    assert again.stderr.read().startswith(b"goes on: ")


def test_a_worker_that_is_killed_ends_the_preparation_and_the_next_goes_on(tmp_path: Path, source: Path) -> None:
    dst = tmp_path / "set"
    process = start(source, str(dst), ["processes=2"])
    until(lambda: len(list(dst.glob(".prepare/unit-*.json"))) >= 3, 60)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert process.wait() == 2
    assert process.stderr is not None
    assert b"error: a worker process ended with code -9" in process.stderr.read()
    assert start(source, str(dst), ["processes=2"]).wait() == 0
    assert verify(str(dst)) == []


def test_a_killed_append_goes_on_and_the_old_dataset_stays_readable(tmp_path: Path, source: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for dst in (whole, broken):
        assert start(source / "0.txt", str(dst), ["processes=1"]).wait() == 0
    old = digests(broken)
    assert start(source / "[123].txt", str(whole), ["processes=1", "append=true"]).wait() == 0
    process = start(source / "[123].txt", str(broken), ["processes=1", "append=true"])
    until(lambda: len(list(broken.glob(".prepare/unit-*.json"))) >= 3, 60)
    process.kill()
    process.wait()
    assert digests(broken) == old
    assert verify(str(broken)) == []
    assert start(source / "[123].txt", str(broken), ["processes=2", "append=true"]).wait() == 0
    assert digests(broken) == digests(whole) != old
    assert inside(broken) == inside(whole)


def test_several_processes_that_want_the_same_corpus_get_one(tmp_path: Path) -> None:
    script = (
        "import sys; from everstep.dataset.prepare import prepare_blocks\n"
        "def read():\n"
        "    print('reads', flush=True)\n"
        "    yield from ((str(n), bytes([n]) * 5000) for n in range(1, 200))\n"
        "prepare_blocks(read(), sys.argv[1], 64, shard_bytes=10000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "deep" / "set")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(said) == [b"", b"", b"reads\n"]
    documents = [(str(n), bytes([n]) * 5000) for n in range(1, 200)]
    prepare_blocks(documents, str(tmp_path / "alone"), 64, shard_bytes=10000)
    assert digests(tmp_path / "deep" / "set") == digests(tmp_path / "alone")


def test_a_preparation_into_a_store_that_was_killed_goes_on(tmp_path: Path, source: Path, s3: str) -> None:
    import fsspec

    store, dst = fsspec.filesystem("s3"), f"{s3}/killed"
    process = start(source, dst, ["processes=1"])

    def noted() -> bool:
        store.invalidate_cache()
        return len(store.glob(f"{dst}/.prepare/unit-*.json")) >= 2

    until(noted, 60)
    process.kill()
    process.wait()
    assert not store.exists(f"{dst}/index.json")
    assert start(source, dst, ["processes=2"]).wait() == 0
    assert start(source, str(tmp_path / "near"), ["processes=2"]).wait() == 0
    assert ShardIndex.read(dst).digest == digests(tmp_path / "near")[0]
    assert verify(dst) == []
    store.invalidate_cache()
    assert not store.exists(f"{dst}/.prepare")
