"""Parser of `explain` in the trainer; the launcher calls it."""

from __future__ import annotations

import argparse
from typing import Any

from everstep.trainer.inference.cli import add_parser as add_inference


def add_parser(verbs: Any) -> None:
    """Add the verb; it sets `run_verb`."""
    parser = add_inference(verbs, "explain")
    parser.add_argument("--samples", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--points", type=int, required=True)
    parser.add_argument("--target", type=int)
    parser.set_defaults(run_verb=_explain)


def _explain(options: argparse.Namespace) -> int:
    from everstep.trainer.explanation.explain import explain

    return explain(options)
