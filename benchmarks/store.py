"""An S3 server of this machine for benchmarks: moto's, in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Its URL; it has one empty bucket."""
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = iter(server.stdout or ())
        url = next(word for line in lines for word in line.split() if word.startswith("http://127.0.0.1:"))
        # The server blocks when nobody reads what it says.
        drain = subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT"), timeout=20).close()
        yield url
        drain.kill()
        drain.wait()
    finally:
        server.kill()
        server.wait()
