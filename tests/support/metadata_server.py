"""Where the metadata addresses of all clouds have moved to, in an environment that names no keys."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.storage import gcs_credentials

NAMES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_EC2_METADATA_DISABLED", "AWS_SKIP_SIGNATURE",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_ID",
    "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_STORAGE_ACCOUNT_NAME",
    "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "CLOUDSDK_CONFIG", "EVERSTEP_INSTANCE_ROLE",
    "GOOGLE_SKIP_SIGNATURE", *gcs_credentials.TAKEN_FIRST,
)  # fmt: skip


class Trap:
    """Where the metadata addresses of all clouds have moved to; it counts who calls."""

    def __init__(self) -> None:
        self.calls = 0
        trap = self

        class Answer(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                trap.calls += 1
                self.rfile.readline()
                self.wfile.write(b"HTTP/1.1 404 None\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Trap]:
    """Nothing but the trap is in the environment."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    made = Trap()
    threading.Thread(target=made.server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{made.address}")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://{made.address}")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, made.address)
    # google-auth reads them once, when some test before this one has imported it.
    monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", made.address)
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", f"http://{made.address}")
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"http://{made.address}/metadata/identity/oauth2/token")
    monkeypatch.setenv("EVERSTEP_STORAGE_DEADLINE_S", "0.1")
    yield made
    made.server.shutdown()
    made.server.server_close()
