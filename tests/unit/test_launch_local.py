"""Signals and children on this machine: one orderly stop, nobody left behind. The child is a few lines of shell."""

from __future__ import annotations

import functools
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.launch.job_start.local_start import Local
from everstep.launch.job_start.signals import Signals
from support.processes import alive, until

pytestmark = pytest.mark.process

DRIVER = """
import sys
from pathlib import Path
from everstep.launch.job_start.local_start import LeftAtOnce, Local
from everstep.launch.job_start.signals import Signals
folder = Path(sys.argv[1])
with Signals() as signals:
    def leave(reason):
        (folder / "stop").write_text(reason)
    local = Local(signals, leave, grace_s=float(sys.argv[2]), agent=sys.argv[4:] == ["agent"])
    try:
        code = local.run(["bash", "-c", sys.argv[3]], {"PATH": "/bin:/usr/bin"})
    except LeftAtOnce:
        code = 130
(folder / "stopped").write_text(str(local.stopped))
sys.exit(code)
"""

IGNORES = "trap '' TERM; echo $$ > child; while :; do sleep 0.05; done"
"""A child that will not stop."""
SAVES = "trap 'cat stop > saved; exit 75' TERM; echo $$ > child; while :; do sleep 0.05; done"
"""A child that stops in order: it finds the marker and says what it read."""


class Driven:
    """A launcher process with a child below it."""

    def __init__(self, folder: Path, script: str, grace_s: float = 60, *more: str) -> None:
        self.folder = folder
        words = [str(folder), str(grace_s), script, *more]
        # The suite may run under nohup, and what the caller ignores stays ignored.
        heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, *words], cwd=folder, preexec_fn=heard)
        until(lambda: (folder / "child").exists() and (folder / "child").read_text().endswith("\n"))
        self.child = int((folder / "child").read_text())

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driven]]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    started: list[Driven] = []

    def start(script: str, grace_s: float = 60, *more: str) -> Driven:
        started.append(Driven(tmp_path, script, grace_s, *more))
        return started[-1]

    yield start
    for driven in started:
        driven.process.kill()
        driven.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_leaves_the_marker_and_asks_the_child_to_stop(
    drive: Callable[..., Driven], number: signal.Signals
) -> None:
    driven = drive(SAVES)
    driven.process.send_signal(number)
    assert driven.process.wait(20) == 75
    assert driven.said("saved") == driven.said("stopped") == number.name


def test_the_workers_of_an_agent_are_told_directly_and_the_agent_is_not(drive: Callable[..., Driven]) -> None:
    agent = f"trap 'touch agent-told' TERM; bash -c \"{SAVES}\" & until [ -e saved ]; do wait; done; exit 0"
    driven = drive(agent.replace("$$", "\\$\\$"), 60, "agent")
    driven.process.send_signal(signal.SIGINT)
    assert driven.process.wait(20) == 0
    assert driven.said("saved") == "SIGINT"
    assert not (driven.folder / "agent-told").exists()


WITH_A_ZOMBIE = """
import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
child = os.fork() or os._exit(0)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
pathlib.Path("child").write_text(f"{os.getpid()}\\n")
while True:
    signal.pause()
"""


def test_an_agent_without_workers_is_told_itself(drive: Callable[..., Driven]) -> None:
    # Its child has ended and nobody has taken note: it is no worker.
    driven = drive(f"exec {sys.executable} -c '{WITH_A_ZOMBIE}'", 60, "agent")
    driven.process.send_signal(signal.SIGTERM)
    assert driven.process.wait(20) == 75


def test_the_second_ctrl_c_leaves_at_once(drive: Callable[..., Driven]) -> None:
    driven = drive(IGNORES)
    driven.process.send_signal(signal.SIGINT)
    until(lambda: (driven.folder / "stop").exists())
    assert driven.process.poll() is None
    driven.process.send_signal(signal.SIGINT)
    assert driven.process.wait(20) == 130
    assert not alive(driven.child)


def test_a_second_sigterm_is_patient(drive: Callable[..., Driven]) -> None:
    driven = drive("trap ':' TERM; echo $$ > child; until [ -e go ]; do sleep 0.02; done; exit 75")
    driven.process.send_signal(signal.SIGTERM)
    until(lambda: (driven.folder / "stop").exists())
    driven.process.send_signal(signal.SIGTERM)
    (driven.folder / "go").touch()
    assert driven.process.wait(20) == 75


def test_a_child_that_ignores_the_stop_is_killed_after_the_grace(drive: Callable[..., Driven]) -> None:
    driven = drive(IGNORES, grace_s=-10)  # the slack beyond the grace is 10 s
    driven.process.send_signal(signal.SIGTERM)
    assert driven.process.wait(20) == 128 + signal.SIGKILL
    assert not alive(driven.child)


def test_kill_9_of_the_launcher_leaves_no_child(drive: Callable[..., Driven]) -> None:
    driven = drive(IGNORES)
    driven.process.kill()
    driven.process.wait()
    until(lambda: not alive(driven.child))


GRANDCHILD = f"setsid bash -c 'echo $$ > grandchild; {IGNORES}' &"


def grandchild_of(driven: Driven) -> int:
    until(lambda: (driven.folder / "grandchild").exists() and driven.said("grandchild").endswith("\n"))
    return int(driven.said("grandchild"))


def test_leaving_at_once_reaches_grandchildren_with_sessions_of_their_own(drive: Callable[..., Driven]) -> None:
    driven = drive(f"trap '' TERM; {GRANDCHILD} while :; do sleep 0.05; done")
    grandchild = grandchild_of(driven)
    driven.process.send_signal(signal.SIGINT)
    until(lambda: (driven.folder / "stop").exists())
    assert alive(grandchild)
    driven.process.send_signal(signal.SIGINT)
    driven.process.wait(20)
    assert not alive(grandchild)


def test_a_child_that_dies_leaves_no_orphans(drive: Callable[..., Driven]) -> None:
    driven = drive(f"{GRANDCHILD} until [ -e go ]; do sleep 0.02; done; kill -9 $$")
    grandchild = grandchild_of(driven)
    (driven.folder / "go").touch()
    assert driven.process.wait(20) == 128 + signal.SIGKILL
    until(lambda: not alive(grandchild))


def test_orphans_that_end_while_the_child_runs_leave_no_zombie(drive: Callable[..., Driven]) -> None:
    driven = drive("(setsid sleep 0 & echo $! > grandchild); echo $$ > child; until [ -e go ]; do sleep 0.02; done")
    orphan = grandchild_of(driven)
    until(lambda: not Path(f"/proc/{orphan}").exists())
    assert driven.process.poll() is None
    (driven.folder / "go").touch()
    assert driven.process.wait(20) == 0


def test_ctrl_c_in_the_terminal_reaches_the_child_once(tmp_path: Path, drive: Callable[..., Driven]) -> None:
    driven = drive("trap 'echo INT >> heard' INT; trap 'echo TERM >> heard; exit 75' TERM; echo $$ > child;"
                   "while :; do sleep 0.05; done")  # fmt: skip
    # What a terminal does: SIGINT to the launcher's whole group; the child has a group of its own.
    assert os.getpgid(driven.child) == driven.child != os.getpgid(driven.process.pid)
    driven.process.send_signal(signal.SIGINT)
    assert driven.process.wait(20) == 75
    assert driven.said("heard") == "TERM\n"


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_childs_as_a_shell_gives_it(script: str, code: int) -> None:
    with Signals() as signals:
        assert Local(signals, lambda _: None, 1).run(["bash", "-c", script], os.environ) == code


def test_what_the_child_leaves_in_its_group_is_gone_when_it_has_ended(tmp_path: Path) -> None:
    with Signals() as signals:
        Local(signals, lambda _: None, 1).run(["bash", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid"], os.environ)
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_store_that_hangs_holds_up_neither_the_stop_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.launch.job_start.local_start.MARKER_S", 0.05)
    with Signals() as signals:
        local = Local(signals, lambda _: time.sleep(60), 60)
        os.kill(os.getpid(), signal.SIGTERM)
        begun = time.monotonic()
        assert local.run(["sleep", "30"], os.environ) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 10


def test_a_signal_ends_the_wait_between_two_starts() -> None:
    with Signals() as signals:
        local = Local(signals, lambda _: None, 1)
        assert local.wait(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not local.wait(60)
        assert local.stopped == "SIGUSR1"


def test_handlers_are_as_before_when_the_launcher_is_done() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    with Signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.take() == []
    finally:
        signal.signal(signal.SIGHUP, before)


TELLS = """
import os, sys
from everstep.trainer.reporting.outcome import hand_over
from everstep.outcome import Ending, Outcome
for reason, lost in [("lost", True), ("mine", False), ("late", False)][int(sys.argv[1]):]:
    hand_over(Ending(Outcome.crashed, 3, reason, lost_peer=lost))
sys.exit(1)
"""


@pytest.mark.parametrize("first", [0, 1])
def test_an_ending_that_the_run_folder_has_not_taken_comes_to_the_launcher(first: int) -> None:
    with Signals() as signals:
        local = Local(signals, lambda _: None, 1)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        assert local.run([sys.executable, "-c", TELLS, str(first)], env) == 1
    assert local.handed_over is not None
    assert (local.handed_over.reason, local.handed_over.step) == ("mine", 3)


@pytest.mark.parametrize(("script", "reason"), [("kill -9 $$", "rank 0 was killed by SIGKILL"),
                                                ("kill -SEGV $$", "rank 0 was killed by SIGSEGV")])  # fmt: skip
def test_what_a_child_was_killed_by_is_known(script: str, reason: str) -> None:
    with Signals() as signals:
        local = Local(signals, lambda _: None, 1)
        local.run(["bash", "-c", script], os.environ)
        assert local.handed_over is not None
        assert local.handed_over.reason == reason
        local.run(["bash", "-c", "exit 0"], os.environ)
        assert local.handed_over is None


def test_an_agent_whose_workers_have_ended_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.launch.job_start.hung_agent.POLL_S", 0.05)
    with Signals() as signals:
        local = Local(signals, lambda _: None, 1, agent=True)
        local.idle_s = 0.5
        begun = time.monotonic()
        # bash is the agent: it has a child for a while, and then stays on without one.
        assert local.run(["bash", "-c", "sleep 1.5 & wait; while :; do :; done"], os.environ) == 137
        assert time.monotonic() - begun < 15
    assert local.handed_over is not None
    assert "the agent hung" in local.handed_over.reason


def test_a_process_that_is_alone_may_read_from_the_terminal() -> None:
    """As a debugger does; in a group of its own it would be stopped at its first read."""
    pid, terminal = pty.fork()
    if pid == 0:
        script = (
            "import os, sys; from everstep.launch.job_start.local_start import Local\n"
            "from everstep.launch.job_start.signals import Signals\n"
            "with Signals() as signals:\n"
            "    sys.exit(Local(signals, print, 1).run(['bash', '-c', 'read word; echo heard $word'], os.environ))"
        )
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        os.execv(sys.executable, [sys.executable, "-c", script])
    os.write(terminal, b"quit\n")
    seen, deadline = b"", time.monotonic() + 20
    while b"heard quit" not in seen and time.monotonic() < deadline:
        try:
            seen += os.read(terminal, 1000) if select.select([terminal], [], [], 1)[0] else b""
        except OSError:  # all have closed it
            break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert b"heard quit" in seen
