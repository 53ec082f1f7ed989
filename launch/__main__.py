"""Command `everstep`. Heavy imports wait until the verb is known, so --help and completion are fast."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from everstep import __version__
from everstep.errors import EverstepError, printable
from everstep.launch.console import say
from everstep.launch.parser import VERBS
from everstep.process_setup import open_closed

ELSEWHERE = {
    "train": "run",
    "fit": "run",
    "start": "run",
    "launch": "run",
    "sbatch": "submit",
    "list": "ls",
    "ps": "ls",
    "stop": "cancel",
    "kill": "cancel",
    "log": "logs",
    "validate": "check",
}
"""Names that other programs use for the verbs."""
HIDDEN = {"__complete": ("everstep.launch.cli.completion", "complete")}

EXAMPLES = """examples:
  everstep run experiment=gpt_stdlib                  train; the run is named after experiment and time
  everstep run experiment=gpt_stdlib run=demo         train; the same command again resumes run=demo
  everstep run experiment=gpt_stdlib run=demo parallel=fsdp job.nproc=2
  everstep run --cfg experiment=digits steps=500      show the resolved config and start nothing
  everstep checkpoint ls runs/demo
  source <(everstep completion bash)

everstep VERB --help says more. EVERSTEP_TRACEBACK=1 shows where an error comes from."""


EARLY = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Early(KeyboardInterrupt):
    """Signal that arrived before there was a run that could save; the message is its name."""


def _on_early(number: int, _: FrameType | None) -> None:
    raise Early(signal.Signals(number).name)


@contextlib.contextmanager
def _early_signals() -> Iterator[None]:
    """Raise Early for signals that would kill this process silently, until the run installs its handlers."""
    here = threading.current_thread() is threading.main_thread()
    caught = [number for number in EARLY if here and signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, _on_early)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. User errors are printed as one line."""
    open_closed()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except EverstepError as error:
        if os.environ.get("EVERSTEP_TRACEBACK") == "1":
            raise
        from everstep.security.secret_detection import without_secrets

        print(printable(without_secrets(f"everstep: {error}")), file=sys.stderr)
        return error.exit_code
    except Early as early:
        say(f"{early}: nothing has been started; the same command begins again")
        return 75
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `everstep … | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def _dispatch(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb in ("-V", "--version"):
        print(f"everstep {__version__}")
        return 0
    if verb not in VERBS and verb not in HIDDEN:
        return _unknown(verb)
    module, function = (HIDDEN[verb] if verb in HIDDEN else VERBS[verb])[:2]
    if not module:
        _become_trainer([verb, *rest])
    with _early_signals() if verb == "run" else contextlib.nullcontext():
        code: int = getattr(importlib.import_module(module), function)(rest)
    return code


def _become_trainer(arguments: list[str]) -> None:
    from everstep.import_path import safe_flags

    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *safe_flags(), "-m", "everstep.trainer", *arguments])


def _unknown(verb: str) -> int:
    from everstep.errors import nearest

    near = f"; did you mean {ELSEWHERE[verb]!r}?" if verb in ELSEWHERE else nearest(verb, VERBS)
    hint = near or f"; there are {', '.join(VERBS)}"
    if "=" in verb:
        hint = f"; write everstep run {verb}"
    print(f"everstep: no verb {verb!r}{hint}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, _, line) in VERBS.items())
    return f"""usage: everstep VERB …

Distributed PyTorch training that never loses a step.

verbs:
{verbs}

options:
  --help     this page
  --version  the version

{EXAMPLES}"""


if __name__ == "__main__":
    sys.exit(main())
