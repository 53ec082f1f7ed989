"""Keys come from what the environment names; without any an error says what to set, and no cloud's address is asked."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from everstep.dataset.readers.source_files import list_files
from everstep.errors import StorageError
from everstep.storage import FsspecStorage, ObstoreStorage, Storage, credentials, filesystem, gcs_credentials
from support.metadata_server import Trap
from support.processes import until
from support.store_servers import AZURITE_KEY, S3_KEYS


def stores() -> list[Storage]:
    return [
        FsspecStorage("s3://bucket/x"), ObstoreStorage("s3://bucket/x"), FsspecStorage("gs://bucket/x"),
        FsspecStorage("abfs://bucket@account.dfs.core.windows.net/x"), FsspecStorage("az://bucket/x"),
        ObstoreStorage("az://bucket/x"), ObstoreStorage("abfs://bucket@account.dfs.core.windows.net/x"),
        ObstoreStorage("gs://bucket/x"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(8))
def test_without_credentials_the_variables_are_named_and_no_metadata_address_is_asked(trap: Trap, number: int) -> None:
    store = stores()[number]
    names = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}
    name = names.get(store.url.split(":")[0], "AZURE_STORAGE_CONNECTION_STRING")
    for verb in (store.exists, store.read, store.names, lambda path: store.create(path, b"")):
        with pytest.raises(StorageError, match=f"no credentials for {store.url}: set .*{name}") as error:
            verb("file")
        assert "EVERSTEP_INSTANCE_ROLE=1" in str(error.value)
        assert "\n" not in str(error.value)
    assert trap.calls == 0


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "az://bucket/x"])
def test_sources_of_a_dataset_are_read_by_the_same_keys(trap: Trap, url: str) -> None:
    with pytest.raises(StorageError, match=f"no credentials for {url}: set "):
        list_files([url])
    assert trap.calls == 0


def test_public_buckets_need_no_keys(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS", "AZURE", "GOOGLE"):
        monkeypatch.setenv(f"{name}_SKIP_SIGNATURE", "true")
    assert credentials.s3_profile("s3://bucket") is None
    assert gcs_credentials.for_gcsfs("gs://bucket") == "anon"
    assert credentials.azure("az://bucket", "mine") == {"account_name": "mine"}
    assert filesystem("s3://bucket")[0].anon
    assert filesystem("abfs://bucket@mine.dfs.core.windows.net/x")[0].anon
    assert trap.calls == 0


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6, 7])
def test_who_wants_the_role_of_the_machine_says_so(trap: Trap, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_INSTANCE_ROLE", "1")

    def read() -> None:
        with contextlib.suppress(StorageError):
            stores()[number].read("file")

    threading.Thread(target=read, daemon=True).start()  # some clients ask for minutes
    until(lambda: trap.calls > 0)


def test_a_profile_without_keys_is_no_way_to_the_metadata_address(trap: Trap, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = eu-west-1\n")
    for store in stores()[:2]:
        with pytest.raises(StorageError, match=r"no credentials for s3://bucket/x: set AWS_ACCESS_KEY_ID"):
            store.read("file")
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nrole_arn = arn:aws:iam::123456789012:role/x\ncredential_source = Ec2InstanceMetadata\n"
    )
    for store in stores()[:2]:
        with pytest.raises(StorageError, match=r"s3://bucket/x"):
            store.read("file")
    assert trap.calls == 0


@pytest.mark.process
@pytest.mark.parametrize("kind", [FsspecStorage, ObstoreStorage])
def test_keys_of_a_profile_open_the_store(s3: str, kind: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in S3_KEYS:
        monkeypatch.delenv(name)
    file = tmp_path / "keys"
    file.write_text("[mine]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = kind(f"{s3}/profile")
    store.write("file", b"x")
    assert store.read("file") == b"x"
    monkeypatch.setenv("AWS_PROFILE", "another")
    with pytest.raises(StorageError, match=r"another"):
        kind(f"{s3}/profile").read("file")


@pytest.mark.process
@pytest.mark.parametrize("kind", [FsspecStorage, ObstoreStorage])
def test_a_wrong_azure_key_is_permission_denied_at_once(
    azure: str, azure_server: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = azure_server.replace(AZURITE_KEY, "A" + AZURITE_KEY[1:])
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    with pytest.raises(StorageError, match=r"az://bucket/x: permission denied"):
        kind(f"{azure}/x").read("file")


def test_azure_is_opened_by_what_the_environment_names(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "abfs://c@mine.dfs.core.windows.net/x"
    monkeypatch.setenv("AZURE_CLIENT_ID", "id")
    monkeypatch.setenv("AZURE_TENANT_ID", "tenant")
    with pytest.raises(StorageError, match="no credentials"):
        credentials.azure(url, "mine")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/token")
    whose = {"account_name": "mine", "client_id": "id", "tenant_id": "tenant"}
    assert credentials.azure(url, "mine") == {**whose, "federated_token_file": "/token"}
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "secret")
    assert credentials.azure(url, "mine") == {**whose, "client_secret": "secret"}
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sas")
    assert credentials.azure(url, "mine") == {"account_name": "mine", "sas_key": "sas"}
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=k==;EndpointSuffix=core.windows.net"
    )
    assert credentials.azure(url, None) == {"account_name": "a", "account_key": "k=="}
