"""From what a trainer wrote down to where the time went."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.launch.runs.goodput import Goodput, goodput, timeline
from everstep.launch.runs.history import read
from everstep.launch.schedulers.job import JobHandle
from support.run_records import Records


def spent(records: Records, until: float | None = None) -> Goodput:
    history = read(records.folder)
    return goodput(timeline(records.folder, history, None, None if until is None else records.began + until))


def parts(found: Goodput) -> dict[str, float]:
    return {name: pytest.approx(seconds, abs=1e-3) for name, seconds in found.parts.items() if seconds > 1e-6}


def test_a_killed_attempt_and_its_successor(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.events(1, (10, "first_step", {"step": 1}), (60, "saved", {"step": 50, "seconds": 4.0}))
    records.steps(1, (60, 50), (90, 80))
    records.decide(1, 95, True, "killed without a word")
    records.attempt(2, 100, restored=50)
    records.events(2, (110, "first_step", {"step": 51}), (180, "evaluated", {"step": 120, "seconds": 5.0}))
    records.steps(2, (130, 70), (150, 90), (200, 140))
    records.end(2, 210, "done", 140)
    found = spent(records)
    # Attempt 1: 10 s to its first step, then 80 s of which a save took 4; its last sign is the record at 90.
    # Attempt 2 has caught up with step 80 halfway between its records at 130 and 150.
    assert found.replayed_steps == 30
    assert parts(found) == {
        "start": 20, "checkpoint": 4, "down": 10, "replayed": 30, "evaluation": 5, "productive": 80 - 4 + 70 - 5,
    }  # fmt: skip
    assert found.wall_s == pytest.approx(210)


def test_the_queue_counts_from_the_submission(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.submit(1, 0, JobHandle("slurm", "c", "1"))
    records.write("starts/0001/start.json", {"time": records.began + 300, "hosts": ["n1", "n2"]})
    records.attempt(1, 310)
    records.events(1, (320, "first_step", {"step": 1}))
    records.end(1, 420, "done", 10)
    assert parts(spent(records)) == {"queue": 300, "start": 20, "productive": 100}


def test_a_run_that_goes_on_counts_until_now(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.events(1, (10, "first_step", {"step": 1}))
    assert parts(spent(records, until=110)) == {"start": 10, "productive": 100}


def test_waiting_for_data_is_a_fraction_of_the_time_between_records(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.events(1, (10, "first_step", {"step": 1}))
    records.steps(1, (60, 50), (110, 100), rate=1.0, data_wait=0.2)
    records.end(1, 110, "preempted", 100)
    assert parts(spent(records)) == {"start": 10, "data wait": 20, "productive": 80}


def test_an_attempt_that_dies_before_it_has_caught_up_did_nothing_else(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.events(1, (0, "first_step", {"step": 1}))
    records.steps(1, (100, 100))
    records.attempt(2, 100, restored=20)
    records.events(2, (100, "first_step", {"step": 21}))
    records.steps(2, (130, 50))
    records.end(2, 130, "crashed", 50)
    found = spent(records)
    assert (parts(found), found.replayed_steps) == ({"productive": 100, "replayed": 30}, 30)


def test_an_attempt_that_left_nothing_but_its_claim_was_starting(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.folder.storage.write(records.folder.attempt(1, "events.jsonl"), b'{"event": "star')
    assert parts(spent(records)) == {"start": 1}


def test_parts_of_an_object_store_are_read_as_one(tmp_path: Path) -> None:
    records = Records(f"memory://goodput/{tmp_path.name}")
    records.attempt(1, 0)
    for part, step in enumerate((1, 9)):
        records.write(f"attempts/0001/events-{part:05d}.jsonl",
                      {"event": "first_step" if not part else "ended", "time": records.began + step})  # fmt: skip
    records.end(1, 9, "done", 9)
    assert parts(spent(records)) == {"start": 1, "productive": 8}
