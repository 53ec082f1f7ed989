"""Google's keys: what stands in a file is what the store hears, by a client that asks nobody else."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import identity_pool, jwt

from everstep.errors import StorageError
from everstep.storage import FsspecStorage, ObstoreStorage, Storage
from everstep.storage import gcs_credentials as google
from support.metadata_server import Trap

FEDERATED = {
    "type": "external_account",
    "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/pool/providers/mine",
    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
}
TOKEN = {
    "access_token": "federated", "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
    "token_type": "Bearer", "expires_in": 3600,
}  # fmt: skip


class Google:
    """Where tokens are exchanged, beside a store without a bucket; it keeps what it was told."""

    def __init__(self) -> None:
        self.bearers: list[str] = []
        self.exchanges = 0
        self.refuses = False
        google = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                google.bearers.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
                self._say(404, b"<Error><Code>NoSuchBucket</Code></Error>")

            do_PUT = do_DELETE = do_GET

            def do_POST(self) -> None:
                if self.path != "/token":
                    return self.do_GET()
                google.exchanges += 1
                return self._say(
                    400 if google.refuses else 200, b"{}" if google.refuses else json.dumps(TOKEN).encode()
                )

            def _say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def server(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    """In place of https://storage.googleapis.com."""
    made = Google()
    threading.Thread(target=made.server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("GOOGLE_BASE_URL", made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()
    assert trap.calls == 0


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


def federated(server: Google, folder: Path) -> str:
    (folder / "subject").write_text("who I am")
    return json.dumps(
        {**FEDERATED, "token_url": f"{server.url}/token", "credential_source": {"file": str(folder / "subject")}}
    )


def test_the_key_of_a_service_account_signs_what_the_store_hears(
    server: Google, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)  # it needs no more than obstore
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    names = {"type": "service_account", "private_key_id": "1", "client_email": "trainer@project.example"}
    keys.write_text(json.dumps({**names, "private_key": private.decode()}))
    with pytest.raises(FileNotFoundError):
        ObstoreStorage("gs://bucket/x").read("file")
    assert jwt.decode(server.bearers[-1], certs={"1": public})["iss"] == "trainer@project.example"


def test_a_federated_identity_is_exchanged_once_for_many_requests(server: Google, keys: Path, tmp_path: Path) -> None:
    keys.write_text(federated(server, tmp_path))
    store = ObstoreStorage("gs://bucket/x")
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            store.read("file")
    assert server.bearers == ["federated"] * 5
    assert server.exchanges == 1


def test_without_google_auth_the_extra_is_named_for_files_that_need_it(
    server: Google, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)
    keys.write_text(federated(server, tmp_path))
    with pytest.raises(StorageError, match=rf"^cannot read {keys} for gs://bucket/x: pip install 'everstep\[gcs\]'$"):
        ObstoreStorage("gs://bucket/x").read("file")
    assert server.bearers == []


def test_what_gcloud_has_left_is_found(server: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    (tmp_path / "gcloud").mkdir()
    (tmp_path / "gcloud" / "application_default_credentials.json").write_text(federated(server, tmp_path))
    with pytest.raises(FileNotFoundError):
        ObstoreStorage("gs://bucket/x").read("file")
    assert server.bearers == ["federated"]


def test_an_exchange_that_is_refused_is_one_line(server: Google, keys: Path, tmp_path: Path) -> None:
    keys.write_text(federated(server, tmp_path))
    server.refuses = True
    with pytest.raises(StorageError, match=r"gs://bucket/x") as error:
        ObstoreStorage("gs://bucket/x").read("file")
    assert "\n" not in str(error.value)
    assert server.bearers == []


@pytest.mark.parametrize("kind", [FsspecStorage, ObstoreStorage])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type": "none"}', '{"type": "service_account", "private_key": ""}'])
@pytest.mark.usefixtures("server")
def test_a_damaged_file_of_keys_is_one_line(keys: Path, kind: type[Storage], text: str) -> None:
    keys.write_text(text)
    with pytest.raises(StorageError, match=r"gs://bucket/x: ") as error:
        kind("gs://bucket/x").read("file")  # type: ignore[call-arg]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [FsspecStorage, ObstoreStorage])
@pytest.mark.usefixtures("server")
def test_a_file_of_keys_that_is_not_there_is_named(
    keys: Path, kind: type[Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("0", "1"):
        monkeypatch.setenv("EVERSTEP_INSTANCE_ROLE", role)
        with pytest.raises(StorageError, match=f"no credentials for gs://bucket/x: GOOGLE_.*={keys} is no file"):
            kind("gs://bucket/x").read("file")  # type: ignore[call-arg]


def test_a_file_of_keys_comes_before_the_role_of_the_machine(
    server: Google, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_INSTANCE_ROLE", "1")
    keys.write_text(federated(server, tmp_path))
    with pytest.raises(FileNotFoundError):
        ObstoreStorage("gs://bucket/x").read("file")
    assert server.bearers == ["federated"]
    assert isinstance(google.for_gcsfs("gs://bucket/x"), identity_pool.Credentials)


@pytest.mark.parametrize("name", ["STORAGE_EMULATOR_HOST", "GOOGLE_SKIP_SIGNATURE"])
def test_who_needs_no_keys_writes_without_asking_for_any(
    server: Google, name: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, server.url.removeprefix("http://") if "HOST" in name else "true")
    store = ObstoreStorage("gs://bucket/x")
    with pytest.raises(StorageError, match="there is no such bucket"):
        store.write("file", b"x")
    with pytest.raises(StorageError, match="there is no such bucket"), store.writer("file") as file:
        file.write(bytes(20_000_000))
    store.delete("file")
    assert len(server.bearers) >= 3
    assert set(server.bearers) == {""}


def test_a_variable_that_obstore_would_believe_first_is_named(
    server: Google, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.write_text("{}")
    monkeypatch.setenv("SERVICE_ACCOUNT", "trainer")
    with pytest.raises(StorageError, match=r"^SERVICE_ACCOUNT would open gs://bucket/x .*: unset it, or pip install"):
        ObstoreStorage("gs://bucket/x").read("file")
    assert server.bearers == []
