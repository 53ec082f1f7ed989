"""Stores of this machine for benchmarks, each in a process of its own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The URL of moto's S3 server; it has one empty bucket."""
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


MODULES = Path("/usr/lib/nginx/modules")
NGINX = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
daemon off; user root; worker_processes 1; pid {scratch}/pid; error_log {scratch}/log;
events {{ }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
    client_body_temp_path {scratch}; proxy_temp_path {scratch};
    server {{
        listen 127.0.0.1:{port}; root {folder};
        location / {{ access_by_lua_block {{ ngx.sleep({delay_s}) }} }}
    }}
}}
"""


@contextlib.contextmanager
def file_server(folder: Path, delay_s: float) -> Iterator[str]:
    """The URL of nginx, which answers as S3 does whoever only reads: `folder` holds a folder for each bucket.

    It costs the reader's machine a tenth of what moto does. Of Debian's packages: nginx-light libnginx-mod-http-lua.
    """
    if not (shutil.which("nginx") and (MODULES / "ngx_http_lua_module.so").exists()):
        raise SystemExit("nginx with Lua is not there: apt-get install nginx-light libnginx-mod-http-lua")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as scratch:
        config = Path(scratch) / "nginx.conf"
        config.write_text(NGINX.format(modules=MODULES, scratch=scratch, port=port, folder=folder, delay_s=delay_s))
        server = subprocess.Popen(["nginx", "-c", str(config)])
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise SystemExit("nginx does not start; it says above why")
