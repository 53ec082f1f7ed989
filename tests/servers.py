"""Servers that tests talk to, each in a process of its own, one for the whole session."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest
from process_helpers import until

BUCKET = "bucket"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server with an empty bucket named `bucket`."""
    pytest.importorskip("moto.server", reason="the S3 server of these tests is moto's, and it is not installed")
    said = tmp_path_factory.mktemp("moto") / "said"
    with said.open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p0"], stderr=log, stdout=log)
    try:
        until(lambda: "Running on http://127.0.0.1:" in said.read_text(), 60)
        url = next(word for word in said.read_text().split() if word.startswith("http://127.0.0.1:"))
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=20).close()
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's bucket as this process sees it: `s3://bucket`."""
    import s3fs

    for name, value in {**S3_KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps the clients that it made, whatever has become of the endpoint in the environment.
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://{BUCKET}"


S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
