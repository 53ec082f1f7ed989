"""Parsers of `evaluate`, `predict` and `export` in the trainer; the launcher calls them."""

from __future__ import annotations

import argparse
from typing import Any


def add_parsers(verbs: Any) -> None:
    """Add the verbs; each sets `run_verb`."""
    evaluate = add_parser(verbs, "evaluate")
    evaluate.add_argument("--by", metavar="COLUMN", default="")
    evaluate.add_argument("--against", metavar="JSON", default="")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run_verb=_evaluate)
    predict = add_parser(verbs, "predict")
    predict.add_argument("--out", required=True, metavar="URL", help="folder of the parts")
    predict.add_argument("--rows", type=int, required=True)
    predict.set_defaults(run_verb=_predict)
    export = add_parser(verbs, "export")
    export.add_argument("--out", required=True, metavar="FOLDER")
    export.add_argument("--format", required=True)
    export.add_argument("--dtype", default="")
    export.set_defaults(run_verb=_export)


def add_parser(verbs: Any, name: str) -> argparse.ArgumentParser:
    """Return the parser of a verb that uses a checkpoint."""
    parser: argparse.ArgumentParser = verbs.add_parser(name)
    parser.add_argument("work", metavar="WORK_URL", help="folder with config.yaml; results are written there")
    parser.add_argument("--source", required=True, metavar="RUN_URL")  # not --run: torchrun has options that begin so
    parser.add_argument("--which", required=True, metavar="last|best|STEP")
    parser.add_argument("--on", required=True, metavar="SET")
    parser.add_argument("--plugins", default="")
    parser.add_argument("--config-digest")
    parser.set_defaults(frozen="the work folder")
    return parser


def _evaluate(options: argparse.Namespace) -> int:
    from everstep.trainer.inference.evaluation import evaluate

    return evaluate(options)


def _predict(options: argparse.Namespace) -> int:
    from everstep.trainer.inference.prediction import predict

    return predict(options)


def _export(options: argparse.Namespace) -> int:
    from everstep.trainer.export.export import export

    return export(options)
