"""Frozen configs and records of run folders, mutated: one line, or a result like any other; never a traceback."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.config import RunConfig
from everstep.errors import ConfigError, EverstepError
from everstep.frozen_config import freeze, thaw
from everstep.launch.cli.ls import COLUMNS, _row
from everstep.launch.runs.history import History, read, read_all
from everstep.launch.runs.summary import summaries
from everstep.outcome import Ending, Outcome
from everstep.run_folder import RunFolder
from support.mutations import EXAMPLES, check_one_line, contents, documents

CONFIG = freeze(RunConfig(run="a", model={"_target_": "a.B", "width": 3, "names": ["x", "y"]}))
RECORDS: dict[str, Any] = {
    "attempts/0001/claim.json": {"time": 1.7e9, "began": 1.7e9, "host": "h", "pid": 5, "world": 2, "starter": "s"},
    "attempts/0001/outcome.json": json.loads(Ending(Outcome.crashed, 3, "why", micro_batch=2).to_json()),
    "attempts/0001/restored.json": {"step": 3, "attempt": 1},
    "progress.json": {
        "time": 1.7e9, "step": 5, "steps": 9, "steps_per_s": 2.5, "eta_s": 3.0, "next_s": 1.0, "loss": 0.5,
        "metric": "accuracy", "metrics": {"accuracy": 0.5},
    },
    "restarts/0001.json": {"time": 1.7e9, "outcome": "crashed", "go_on": True, "reason": "x", "restarts": 1},
    "starts/0001/start.json": {"time": 1.7e9, "hosts": ["a", "b"]},
    "submissions/0001.json": {"time": 1.7e9, "scheduler": "slurm", "token": "t", "argv": ["-m", "x"], "code": None},
    "submissions/0001.handle.json": {"handle": "slurm://cluster/12"},
}  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(contents(CONFIG.encode()))
def test_a_mutated_config_is_refused_in_one_line_or_means_what_it_says(data: bytes) -> None:
    began = time.monotonic()
    try:
        run = thaw(data.decode(errors="surrogateescape"))
    except ConfigError as refused:
        check_one_line(refused)
    else:
        assert thaw(freeze(run)) == run
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="everstep-fuzz-") as name:
        for path, record in RECORDS.items():
            for run in ("good", "odd"):
                file = Path(name) / run / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(record))
        yield Path(name)


@settings(max_examples=EXAMPLES)
@given(data=st.data(), path=st.sampled_from(sorted(RECORDS)))
def test_a_mutated_record_is_a_line_and_leaves_other_runs_alone(root: Path, data: st.DataObject, path: str) -> None:
    file = root / "odd" / path
    file.write_bytes(data.draw(documents(RECORDS[path])))
    try:
        good, odd = read_all([RunFolder(str(root / run)) for run in ("good", "odd")])
        assert isinstance(good, History)
        for history in (good, odd):
            if isinstance(history, EverstepError):
                check_one_line(history)
                continue
            (line,) = summaries([history], ask=lambda handles: {})
            facts = line.facts(time.time())
            assert len(_row(facts)) == len(COLUMNS)
            json.dumps(facts)
        try:
            RunFolder(str(root / "odd")).lineage()
            read(RunFolder(str(root / "odd")))
        except EverstepError as refused:
            check_one_line(refused)
    finally:
        file.write_text(json.dumps(RECORDS[path]))
