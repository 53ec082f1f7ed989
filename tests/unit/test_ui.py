"""`everstep ui`: runs and reports on the loopback address, for the holder of the token alone."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from everstep.errors import ConfigError
from everstep.launch.cli.ui import ui
from everstep.launch.ui.server import COOKIE, UiServer
from support import TESTS

HOSTILE = '<img src=x onerror=alert(1)>"'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[UiServer]:
    for name in ("first", HOSTILE.replace("/", "")):
        shutil.copytree(TESTS / "recorded/run-killed-twice", tmp_path / "runs" / name)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/config.yaml").write_text("secret: 1")
    with UiServer(str(tmp_path / "runs"), 0) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()


def ask(server: UiServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def known(server: UiServer, path: str) -> tuple[int, str, http.client.HTTPMessage]:
    return ask(server, path, Cookie=f"{COOKIE}={server.token}")


def test_the_printed_address_puts_the_token_into_a_cookie_and_out_of_the_address(server: UiServer) -> None:
    asked = urlsplit(server.url)
    assert (asked.hostname, parse_qs(asked.query)) == ("127.0.0.1", {"token": [server.token]})
    status, _, headers = ask(server, f"/?token={server.token}")
    assert (status, headers["Location"]) == (303, "/")
    assert headers["Set-Cookie"] == f"{COOKIE}={server.token}; HttpOnly; SameSite=Strict; Path=/"


@pytest.mark.parametrize("path", ["/", "/run/first", "/metrics", "/?token=wrong"])
def test_without_the_token_nothing_is_shown(server: UiServer, path: str) -> None:
    status, text, _ = ask(server, path)
    assert status == 403
    assert text == "the token is missing; open the address that everstep ui has printed\n"


def test_a_page_elsewhere_whose_name_resolves_to_this_machine_is_refused(server: UiServer) -> None:
    status, text, _ = ask(server, "/", Host="evil.example:80", Cookie=f"{COOKIE}={server.token}")
    assert (status, text) == (403, "this server answers to 127.0.0.1 alone\n")


def test_a_token_never_sends_the_browser_to_another_host(server: UiServer) -> None:
    _, _, headers = ask(server, f"//evil.example/?token={server.token}")
    assert not headers["Location"].startswith("//")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(server: UiServer, method: str) -> None:
    status, _, _ = ask(server, "/run/first", method, Cookie=f"{COOKIE}={server.token}")
    assert status == 501


def test_the_list_links_each_run_and_shows_a_hostile_name_as_text(server: UiServer) -> None:
    status, text, headers = known(server, "/")
    assert (status, headers["Refresh"]) == (200, "10")
    assert '<a href="/run/first">first</a>' in text
    assert "<img" not in text
    assert "default-src" in text


def test_a_run_is_its_report_and_does_not_reload_when_it_is_over(server: UiServer) -> None:
    status, text, headers = known(server, "/run/first")
    assert (status, headers["Refresh"], headers["Cache-Control"]) == (200, None, "no-store")
    assert 'id="everstep-report"' in text


@pytest.mark.parametrize("name", ["..%2Foutside", "%2Fetc", "nothing", "..", ""])
def test_only_runs_below_the_root_are_shown(server: UiServer, name: str) -> None:
    status, text, _ = known(server, f"/run/{name}")
    assert status == 404
    assert "there is no such run" in text


def test_prometheus_reads_the_figures_with_the_token_as_a_bearer(server: UiServer) -> None:
    status, text, headers = ask(server, "/metrics", Authorization=f"Bearer {server.token}")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'everstep_state{run="first",state="done"} 1' in text
    assert 'everstep_step{run="first"} 1500' in text
    assert f'run="{HOSTILE.replace(chr(34), chr(92) + chr(34))}"' in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.rpartition(" ")[2].replace(".", "", 1).replace("e-", "").lstrip("-").isdigit() for line in lines)


def test_a_port_that_is_taken_is_one_line(server: UiServer) -> None:
    with pytest.raises(ConfigError, match=rf"--port {server.server_port}: Address already in use; choose another"):
        UiServer(server.table.root, server.server_port)


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run; 'everstep ui ROOT' looks elsewhere"):
        ui([str(tmp_path)])
