"""Headless Chromium, driven over its debugging pipe: pages from files, screenshots, console, requests."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
]
ANSWER_S = 60.0


class Browser:
    """One Chromium with one page. Commands and events are JSON texts that end in a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        low = theirs_in, theirs_out
        theirs_in, theirs_out = (fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in low)
        # Chromium reads its descriptor 3 and writes 4: a shell puts our pipes there. (dash knows no number above 9.)
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (*low, theirs_in, theirs_out):
            os.close(each)
        self._in, self._out, self._rest, self._number = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        page = next(each for each in self._call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Load a file and wait until its charts are drawn."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + ANSWER_S
        while not self.evaluate("document.documentElement?.dataset.drawn"):
            assert time.monotonic() < deadline, self.problems()
            time.sleep(0.05)

    def evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=9)

    def mouse(self, *moves: tuple[str, float, float], clicks: int = 1) -> None:
        """Send mouse events: mousePressed, mouseMoved or mouseReleased, with the place in the window."""
        for kind, x, y in moves:
            more = {"button": "left", "buttons": 1, "clickCount": clicks}
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self, out: Path, height: int | None = None) -> None:
        width = self.evaluate("innerWidth")
        clip = {
            "x": 0,
            "y": 0,
            "width": width,
            "height": height or self.evaluate("document.documentElement.scrollHeight"),
        }
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1})
        out.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])

    def problems(self) -> list[str]:
        """Return the errors and warnings of the console and the log, and uncaught exceptions."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [each for each in self.events if each["method"] in kinds]
        said = [each for each in self.events if each["method"] == "Runtime.consoleAPICalled"]
        return [json.dumps(each["params"]) for each in [*found, *said]]

    def requests(self) -> list[str]:
        """Return the URLs that the page has asked for, but its own."""
        asked = [each["params"] for each in self.events if each["method"] == "Network.requestWillBeSent"]
        urls = [each["request"]["url"] for each in asked if each["type"] != "Document"]
        return [url for url in urls if not url.startswith("data:")]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        sent: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            sent["sessionId"] = self._session
        os.write(self._out, json.dumps(sent).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if "method" in answer:
                self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium gives no answer"
            data = os.read(self._in, 1 << 20)
            assert data, "chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
