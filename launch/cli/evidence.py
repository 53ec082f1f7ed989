"""`everstep evidence RUN`: all records of a run in one archive, and the check of such an archive."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from everstep.errors import ConfigError, printable
from everstep.launch.evidence.archive import faults, is_signed, write_archive
from everstep.launch.parser import Arguments
from everstep.launch.runs.lookup import add_root, find
from everstep.security.signing import KEY, is_on

EXAMPLES = """examples:
  everstep evidence demo                        writes demo.evidence.zip
  everstep evidence demo --out audit/demo.zip
  everstep evidence --verify demo.evidence.zip

exit codes: 0 written, or whole; 1 the archive is not as its index says; 2 wrong usage
"""


def evidence(arguments: Sequence[str]) -> int:
    """Run the verb; write an archive, or check one."""
    options = _parser().parse_args(arguments)
    if (options.run is None) == (options.verify is None):
        raise ConfigError("give either a RUN, or --verify FILE")
    if options.verify is not None:
        return _verify(Path(options.verify))
    run = find(options.run, options.root)
    name = run.url.rstrip("/").rpartition("/")[2]
    out = Path(options.out or f"{name}.evidence.zip")
    files, digest = write_archive(run, out)
    print(printable(f"{out}: {files} files; BLAKE3 of its index {digest}"))
    return 0


def _verify(path: Path) -> int:
    found = list(faults(path))
    for fault in found:
        print(printable(f"{path}: {fault}"), file=sys.stderr)
    if not found:
        print(printable(f"{path} is whole: every file is as its index says; BLAKE3 of all {_digest(path)}"))
        print(_trusted(path))
    return 1 if found else 0


def _trusted(path: Path) -> str:
    if is_on():
        return f"its index was signed with the key of {KEY}"
    if is_signed(path):
        return f"its index is signed, which was not checked; set {KEY} to check it"
    return "its index is not signed: it shows damage, not forgery"


def _digest(path: Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="everstep evidence",
        description="Write all records of a run, without secrets, into one archive with a digest of each file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a name, a path or a URL")
    add_root(parser)
    parser.add_argument("--out", metavar="FILE", help="a new file on this machine (NAME.evidence.zip)")
    parser.add_argument("--verify", metavar="FILE", help="check an archive against its own digests")
    return parser
