"""Notifications of a run: a thread of the launcher reads the run folder, and tells what has happened.

Nothing of it is in a process that trains, so neither a slow command nor a dead server can hold a step up.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

from everstep.errors import EverstepError
from everstep.launch.config.notify import NotifyConfig
from everstep.launch.console import say
from everstep.outcome import Outcome
from everstep.run_folder import EVENTS, PROGRESS, RESTARTS, RunFolder

POLL_S = 5.0
"""Seconds between two looks at the run folder."""
TELL_S = 30.0
"""Seconds that a command or a server may take."""
CLOSE_S = 2 * TELL_S
"""Seconds that the end of the launcher waits for the last ones."""


@dataclass(frozen=True)
class Notice:
    """One event that is told."""

    kind: str
    run: str
    url: str
    step: int
    message: str

    def environment(self) -> dict[str, str]:
        facts = {"EVENT": self.kind, "RUN": self.run, "URL": self.url, "STEP": self.step, "MESSAGE": self.message}
        return {f"EVERSTEP_{name}": str(value) for name, value in facts.items()}

    def body(self) -> bytes:
        facts = {"event": self.kind, "run": self.run, "url": self.url, "step": self.step, "message": self.message}
        return json.dumps({"text": f"{self.run}: {self.message}", **facts}).encode()


@dataclass
class Watch:
    """What has happened in a run folder since the last look."""

    folder: RunFolder
    name: str
    no_progress_s: float
    _restarts: int = 0
    _read: dict[int, int] = field(default_factory=dict)
    """Attempt → events that were read."""
    _step: int = -1
    _since: float = field(default_factory=time.monotonic)
    _told: bool = False

    def __post_init__(self) -> None:
        self._restarts = len(self.folder.storage.names(RESTARTS))
        self._read = {number: len(list(self.folder.lines(number, EVENTS))) for number in self.folder.attempts()[-1:]}

    def news(self) -> Iterator[Notice]:
        yield from self._best()
        yield from self._decisions()
        yield from self._standstill()

    def _notice(self, kind: str, message: str, step: int | None = None) -> Notice:
        at = int(self.folder.facts(PROGRESS).get("step") or 0) if step is None else step
        return Notice(kind, self.name, self.folder.url, at, message)

    def _best(self) -> Iterator[Notice]:
        for number in self.folder.attempts()[-1:]:
            events = list(self.folder.lines(number, EVENTS))
            new, self._read[number] = events[self._read.get(number, 0) :], len(events)
            for event in new:
                if event.get("event") == "evaluated" and event.get("best"):
                    yield self._notice("best", str(event.get("line", "")), int(event.get("step") or 0))

    def _decisions(self) -> Iterator[Notice]:
        names = sorted(self.folder.storage.names(RESTARTS))
        new, self._restarts = names[self._restarts :], len(names)
        for name in new:
            decision = self.folder.facts(f"{RESTARTS}/{name}")
            yield self._notice(kind_of(decision.get("outcome")), str(decision.get("reason", "")))

    def _standstill(self) -> Iterator[Notice]:
        step = int(self.folder.facts(PROGRESS).get("step") or 0)
        if step != self._step:
            self._step, self._since, self._told = step, time.monotonic(), False
        elif not self._told and time.monotonic() - self._since > self.no_progress_s:
            self._told = True
            yield self._notice("no_progress", f"no step since {step} for {self.no_progress_s:.0f} s", step)


def kind_of(outcome: object) -> str:
    """Return the kind of a decision by the outcome that it was made about."""
    over = outcome in (Outcome.done.value, Outcome.preempted.value, "stopped")
    return "end" if over else "stall" if outcome == Outcome.stalled.value else "failure"


def tell_decision(folder: RunFolder, config: NotifyConfig, outcome: str, reason: str) -> None:
    """Tell a decision of the restart policy, for a batch script, which has no thread that watches."""
    kind = kind_of(outcome)
    if config.is_on and kind in config.on:
        step = int(folder.facts(PROGRESS).get("step") or 0)
        tell(config, Notice(kind, folder.url.rstrip("/").rpartition("/")[2], folder.url, step, reason))


class Notifier:
    """Context in which the events of a run are told; without a command or webhook it does nothing."""

    def __init__(self, folder: RunFolder, name: str, config: NotifyConfig) -> None:
        self.config = config
        self._watch = Watch(folder, name, config.no_progress_s) if config.is_on else None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)

    def __enter__(self) -> Notifier:
        if self._watch is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._watch is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(POLL_S)  # one more look after the end
            with contextlib.suppress(EverstepError, OSError, ValueError):
                for notice in self._watch.news() if self._watch is not None else ():
                    if notice.kind in self.config.on:
                        tell(self.config, notice)


def tell(config: NotifyConfig, notice: Notice) -> None:
    """Run the command and post to the webhook; what fails is a line on the terminal."""
    if config.command is not None:
        _run_command(config.command, notice)
    if config.webhook is not None:
        _post(config.webhook, notice)


def _run_command(command: str, notice: Notice) -> None:
    environment = {**os.environ, **notice.environment()}
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(TELL_S)
        if code:
            say(f"job.notify.command ended with {code} ({notice.kind})")
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        say(f"job.notify.command did not end within {TELL_S:.0f} s and was killed ({notice.kind})")


def _post(variable: str, notice: Notice) -> None:
    url = os.environ.get(variable, "")
    if not url.startswith(("http://", "https://")):
        say(f"job.notify.webhook={variable}: the variable holds no http(s) URL; {notice.kind} was not told")
        return
    try:
        request = urllib.request.Request(url, notice.body(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TELL_S):
            pass
    except (OSError, ValueError) as error:  # the message must not show the URL, which may be a secret
        say(f"job.notify.webhook={variable}: {type(error).__name__}; {notice.kind} was not told")
