"""The registry on every store: one of many writers wins, readers see whole versions, and a killed writer harms none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from everstep.errors import ConfigError, DataError
from everstep.registry.registry import MovedError, Registry
from support.fault_proxy import fault_proxy
from support.processes import until

pytestmark = pytest.mark.process
STORES = ("s3", "gcs", "azure")


def export(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "model.pt2").write_text(text)
    (folder / "export.json").write_text(json.dumps({"format": "pt2", "file": "model.pt2"}))
    return folder


@pytest.fixture(params=STORES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """A registry in a bucket with three versions of spam."""
    found = Registry(f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex}")
    for number in (1, 2, 3):
        assert found.add("spam", export(tmp_path / f"export-{number}", f"weights {number}")).number == number
    return found


def in_threads(count: int, call: object) -> None:
    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_versions_and_aliases_are_as_on_a_disk(models: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        models.promote(models.version("spam", number), "prod")
    assert models.rollback("spam", "prod").version == 1
    assert [move.version for move in models.history("spam", "prod")] == [1, 2, 1]
    assert (models.models(), models.versions("spam"), list(models.aliases("spam"))) == (["spam"], [1, 2, 3], ["prod"])
    assert models.add("spam", tmp_path / "export-2").number == 2
    assert (models.fetch(models.find("spam@prod"), tmp_path / "got") / "model.pt2").read_text() == "weights 1"
    with pytest.raises(ConfigError, match="has no such alias"):
        models.find("spam@dev")


def test_of_promoters_who_decided_for_the_same_champion_exactly_one_wins(models: Registry) -> None:
    first = models.promote(models.version("spam", 1), "prod")
    won: list[int] = []
    lost: list[str] = []
    gate = threading.Barrier(4)

    def promote(number: int) -> None:
        mine = Registry(models.url)
        version = mine.version("spam", 2 + number % 2)
        gate.wait()
        try:
            won.append(mine.promote(version, "prod", after=first.number).version)
        except MovedError as error:
            lost.append(str(error))

    in_threads(4, promote)
    assert (len(won), len(lost)) == (1, 3)
    assert [move.version for move in models.history("spam", "prod")] == [1, *won]


def test_adders_at_once_get_numbers_of_their_own(models: Registry, tmp_path: Path) -> None:
    folders = [export(tmp_path / f"more-{number}", f"more {number}") for number in range(4)]
    in_threads(4, lambda number: Registry(models.url).add("spam", folders[number]))
    assert models.versions("spam") == [1, 2, 3, 4, 5, 6, 7]
    assert len({models.version("spam", number).digest for number in range(4, 8)}) == 4


def test_a_reader_gets_a_whole_version_through_every_promotion(models: Registry, tmp_path: Path) -> None:
    models.promote(models.version("spam", 1), "prod")
    seen: set[tuple[int, str]] = set()
    faults: list[Exception] = []
    over = threading.Event()

    def read() -> None:
        mine, turn = Registry(models.url), 0
        while not over.is_set():
            turn += 1
            try:
                version = mine.find("spam@prod")
                got = mine.fetch(version, tmp_path / f"got-{turn}")
                seen.add((version.number, (got / "model.pt2").read_text()))
            except Exception as error:
                faults.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for number in (2, 3, 1, 2, 3, 1, 2):
        models.promote(models.version("spam", number), "prod")
        until(lambda number=number: bool(faults) or number in {each for each, _ in seen} or not reader.is_alive(), 30)
    over.set()
    reader.join()
    assert faults == []
    assert seen == {(number, f"weights {number}") for number in (1, 2, 3)}


def test_an_adder_that_is_killed_before_its_record_leaves_no_version_and_stops_no_other(
    models: Registry, tmp_path: Path
) -> None:
    folder = export(tmp_path / "killed", "killed")
    program = f"""
import sys, time
from everstep.registry.registry import Registry
models = Registry({models.url!r})
def stop(place, line):
    print("uploaded", flush=True)
    time.sleep(600)
models._create = stop
models.add("spam", {str(folder)!r})
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as adder:
        assert adder.stdout is not None
        assert adder.stdout.readline() == "uploaded\n"
        os.kill(adder.pid, signal.SIGKILL)
    assert models.versions("spam") == [1, 2, 3]
    made = models.add("spam", folder)
    assert (made.number, (models.fetch(made, tmp_path / "got") / "model.pt2").read_text()) == (4, "killed")


def test_a_damaged_file_in_a_bucket_is_never_given_out(models: Registry, tmp_path: Path) -> None:
    version = models.version("spam", 2)
    models.storage.write(f"spam/files/{version.digest}/model.pt2", b"weightz 2")
    with pytest.raises(DataError, match="is not the file that was added"):
        models.fetch(version, tmp_path / "got")
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("lost", [False, True])
def test_a_store_that_fails_or_loses_an_answer_makes_no_move_twice_and_none_is_lost(
    s3_server: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    with fault_proxy(int(s3_server.rsplit(":", 1)[1])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        models = Registry(f"{s3}/{uuid.uuid4().hex}")
        version = models.add("spam", export(tmp_path / "export", "weights"))
        if lost:
            proxy.lose(method="PUT", path="aliases")
        else:
            proxy.fail(status=503, times=2, method="PUT", path="aliases")
        assert models.promote(version, "prod", "once").number == 1
        assert [move.why for move in models.history("spam", "prod")] == ["once"]
        assert any(request.fault for request in proxy.requests)
