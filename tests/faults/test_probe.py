"""Before a run begins in a store, the store shows that it refuses the second of two writers."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from everstep.errors import StorageError
from everstep.run_folder import RunFolder
from everstep.storage import LocalStorage, Storage, probe
from support.fault_proxy import Proxy
from support.store_clients import Way

pytestmark = pytest.mark.process
TESTS = Path(__file__).parent.parent


def test_a_store_that_keeps_the_promise_is_left_as_it_was(store: Storage) -> None:
    probe(store)
    assert store.names() == []


def test_a_store_that_lets_the_second_writer_win_is_refused(proxy: Proxy, store: Storage, way: Way) -> None:
    proxy.strip = way.condition
    with pytest.raises(StorageError, match=rf"{store.url} lets a second writer overwrite .*run_root"):
        probe(store)
    assert store.names() == []


def test_a_claim_probes_and_takes_nothing_from_a_store_that_is_refused(proxy: Proxy, store: Storage, way: Way) -> None:
    assert RunFolder(store.url).claim({}) == 1
    proxy.strip = way.condition
    with pytest.raises(StorageError, match="lets a second writer overwrite"):
        RunFolder(store.url).claim({})
    assert store.names() == ["attempts"]
    assert RunFolder(store.url).attempts() == [1]


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "permission denied"), (404, "there is no such bucket"), (507, "gave up after .*InsufficientStorage")],
)
def test_a_store_that_cannot_be_written_is_one_line(
    proxy: Proxy, store: Storage, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "0.5")
    proxy.fail(status=status, times=100, method="PUT")
    with pytest.raises(StorageError, match=f"{store.url}.*{said}") as error:
        probe(store)
    assert "\n" not in str(error.value)
    if status != 507:
        assert len([request for request in proxy.requests if request.method == "PUT"]) == 1


def test_a_local_disk_is_not_probed(tmp_path: Path) -> None:
    probe(LocalStorage(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("warm")
def test_a_trainer_does_not_start_in_a_store_that_is_refused(proxy: Proxy, way: Way, tmp_path: Path) -> None:
    proxy.strip = way.condition
    words = [
        "--config-dir",
        str(TESTS / "conf"),
        "experiment=toy",
        f"run_root={way.protocol}://bucket/{uuid.uuid4().hex}",
        "run=r",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "everstep.trainer", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "lets a second writer overwrite" in ended.stderr
