"""A process forked from one that has imported everything is given, and gives back, what an executed one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import PATHS
from support.processes import until

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("warm"),
              pytest.mark.skipif("EVERSTEP_TESTS_COLD" in os.environ, reason="all are executed")]  # fmt: skip
FACTS = [sys.executable, "-m", "support.process_facts"]


def environment(folder: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": PATHS,
        "TMPDIR": str(folder),
        "PATH": os.environ["PATH"],
        "ONLY": "this",
        "PYTHONHASHSEED": "0",
    }


def ask(how: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words, env = [*FACTS, how], environment(folder)
    return subprocess.run(
        words, cwd=folder, env=env, text=True, capture_output=True, timeout=60, check=False, **options
    )


def test_it_has_the_parent_the_place_and_the_streams_that_popen_was_given(tmp_path: Path) -> None:
    ended = ask("0", tmp_path, input="words", start_new_session=True)
    facts = json.loads(ended.stdout)
    assert facts["torch"], "it was not forked"
    assert (facts["parent"], facts["session"], facts["group"]) == (os.getpid(), facts["pid"], facts["pid"])
    assert (facts["folder"], facts["temporary"], facts["read"]) == (str(tmp_path), str(tmp_path), "words")
    given = environment(tmp_path)
    assert facts["environment"] == given
    assert facts["first"] == [str(tmp_path), PATHS.split(os.pathsep)[0]]
    assert (facts["argv"], facts["open"], facts["term"]) == (["0"], ["0", "1", "2", "3"], True)
    assert facts["shown"] == [[*FACTS, "0"], [f"{name}={value}" for name, value in given.items()]]
    assert (ended.returncode, ended.stderr) == (0, "at exit\n")


def test_what_it_starts_is_its_child(tmp_path: Path) -> None:
    outer, inner = map(json.loads, ask("nested", tmp_path).stdout.splitlines())
    assert (inner["parent"], inner["group"], inner["torch"]) == (outer["pid"], outer["group"], True)


@pytest.mark.parametrize(("how", "code", "said"), [("3", 3, ""), ("word", 1, "asked for\n"),
                                                   ("error", 1, "ValueError: asked for\n")])  # fmt: skip
def test_it_ends_as_python_does(tmp_path: Path, how: str, code: int, said: str) -> None:
    ended = ask(how, tmp_path)
    assert ended.returncode == code
    assert ended.stderr.endswith(f"{said}at exit\n")
    assert ("Traceback" in ended.stderr) == (how == "error")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV])
def test_a_signal_ends_it_as_any_other_process(tmp_path: Path, number: signal.Signals) -> None:
    env = {**os.environ, "PYTHONPATH": PATHS}
    with subprocess.Popen([*FACTS, "wait"], env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["pid"] == process.pid
        until(lambda: "S" in Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0])
        process.send_signal(number)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert "Fatal" not in said


def test_another_command_is_executed() -> None:
    words = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout == "False\n"
