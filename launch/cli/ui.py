"""`everstep ui`: serve the runs and their reports to this machine's browser, read-only."""

from __future__ import annotations

import argparse
import contextlib
import webbrowser
from collections.abc import Sequence

from everstep.errors import ConfigError
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import ROOT
from everstep.storage import open_storage

EXAMPLES = """examples:
  everstep ui --open                                     the runs in runs/, in your browser
  everstep ui s3://bucket/runs --port 8080               on a login node: ssh -L 8080:127.0.0.1:8080 there
  curl -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8080/metrics     figures for Prometheus
"""


def ui(arguments: Sequence[str]) -> int:
    """Run the verb until Ctrl-C."""
    options = _parser().parse_args(arguments)
    if not open_storage(options.root).names():
        raise ConfigError(f"{options.root} holds no run; 'everstep ui ROOT' looks elsewhere")
    from everstep.launch.ui.server import UiServer

    with UiServer(options.root, options.port) as server:
        print(f"{server.url}\nCtrl-C ends it; only this machine can reach it, with this token", flush=True)
        if options.open:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep ui",
        description="Serve the runs and their reports on 127.0.0.1, read-only, with a token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", nargs="?", default=ROOT, metavar="ROOT", help=f"a path or any URL ({ROOT})")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--open", action="store_true", help="open a browser")
    return parser
