"""A file in a store that is too large to be read whole is refused, as one on a disk is."""

from __future__ import annotations

import uuid

import pytest

from everstep.errors import StorageError
from everstep.storage import FsspecStorage, ObstoreStorage, Storage, fsspec_backend, obstore_backend, read_limited

LIMIT = 64


@pytest.fixture(params=["memory", "s3", "s3 by obstore", "gcs", "gcs by obstore", "azure", "azure by obstore"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for module in (fsspec_backend, obstore_backend):
        monkeypatch.setattr(module, "LARGEST_READ", LIMIT)
    kind, _, by = str(request.param).partition(" by ")
    root = "memory:/" if kind == "memory" else str(request.getfixturevalue(kind))
    url = f"{root}/{uuid.uuid4().hex}"
    return ObstoreStorage(url) if by else FsspecStorage(url)


@pytest.mark.process
def test_a_file_that_is_too_large_to_be_read_whole_is_refused_with_its_name(store: Storage) -> None:
    for size in (0, 1, LIMIT):
        store.write("index.json", bytes(size))
        assert store.read("index.json") == bytes(size)
    store.write("index.json", bytes(LIMIT + 1))
    with pytest.raises(StorageError, match=r"/index\.json: it has .*65 bytes|/index\.json: it has more than 64 bytes"):
        store.read("index.json")


@pytest.mark.process
def test_a_limited_read_holds_for_a_store_too(store: Storage) -> None:
    store.write("record.json", bytes(16))
    assert read_limited(store, "record.json", 16) == bytes(16)
    with pytest.raises(ValueError, match=r"record\.json has more than 15 bytes"):
        read_limited(store, "record.json", 15)
    with pytest.raises(FileNotFoundError):
        read_limited(store, "other.json", 15)
