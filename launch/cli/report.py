"""`everstep report RUN`: write what happened as one HTML page, or print it as JSON or Markdown."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from everstep.errors import ConfigError, printable
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_run, find
from everstep.launch.sweep.sweep_folder import sweep_at

EXAMPLES = """examples:
  everstep report demo                    writes demo.report.html
  everstep report demo --out /tmp/d.html --open
  everstep report demo --against first    also what differs between the two
"""


def report(arguments: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 for any state of the run."""
    options = _parser().parse_args(arguments)
    from everstep.launch.report.facts import collect
    from everstep.launch.report.markdown import markdown
    from everstep.launch.report.page import page
    from everstep.launch.report.text import clean

    _refuse_sweep(options.run, options.root)
    folder = find(options.run, options.root)
    against = find(options.against, options.root) if options.against else None
    facts = clean(collect(folder, against))
    if options.json or options.md:
        print(json.dumps(facts, indent=1) if options.json else markdown(facts), flush=True)
        return 0
    out = Path(options.out or f"{_file_name(facts['run'])}.report.html")
    _write(out, page(facts, "run.html.j2"))
    print(printable(f"{out}: {facts['sentence']}"))
    if options.open:
        _open(out)
    return 0


def _refuse_sweep(word: str, root: str) -> None:
    if sweep_at(word, root) is not None:
        raise ConfigError(f"{word}: it is a sweep, and a report is of one run; give SWEEP/trials/NAME of a trial")


def _file_name(run: str) -> str:
    """Return the name of a run without characters that a shell or a file system interprets."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip(".-") or "run"


def _write(out: Path, text: str) -> None:
    """Write the file at once, readable for its owner alone; an interruption leaves the old one."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it, or choose another")
    if out.is_dir():
        raise ConfigError(f"--out {out}: it is a folder; give the name of a file")
    with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=f".{out.name}.", delete=False) as staged:
        try:
            staged.write(text)
            staged.close()
            os.replace(staged.name, out)
        except BaseException:
            os.unlink(staged.name)
            raise


def _open(out: Path) -> None:
    import webbrowser

    if not webbrowser.open(out.resolve().as_uri()):
        print(f"no browser was found here; open {out.resolve()} in one")


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep report",
        description="Write what happened in a run as one HTML page that needs nothing else.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--out", metavar="FILE", help="the page (NAME.report.html in this folder)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--against", metavar="RUN", help="another run: show what differs in config, code, data, figures"
    )
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print an object, for scripts")
    printed.add_argument("--md", action="store_true", help="print Markdown, for a pull request")
    return parser
