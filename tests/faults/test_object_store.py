"""A run whose folder is in an object store: killed, resumed, damaged, as on a disk. The server is a real process."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.run_folder import RunFolder
from everstep.storage import ObstoreStorage, open_storage
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.reporting.sinks import read_metrics
from support import kill_points
from support.ranks import ledger, train

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_a_killed_run_in_an_object_store_goes_on_to_the_bits_of_a_local_one(
    request: pytest.FixtureRequest, store: str, tmp_path: Path
) -> None:
    bucket = request.getfixturevalue(store)
    assert isinstance(open_storage(bucket), ObstoreStorage)
    assert train(2, tmp_path).codes == [0, 0]
    remote = f"run_root={bucket}/runs"
    notes = tmp_path / "notes"
    notes.mkdir()
    killed = train(2, notes, remote, before=lambda rank: kill_points.in_step(7) if rank == 1 else None)
    assert killed.codes[1] == -9, killed.printed
    resumed = train(2, notes, remote)
    assert resumed.codes == [0, 0], resumed.printed
    run = RunFolder(f"{bucket}/runs/toy")
    ending = run.last_ending()
    assert ending is not None
    assert ending.outcome is Outcome.done
    assert ledger(notes) == ledger(tmp_path)
    assert list(differences(locate(run.url), locate(str(tmp_path / "toy")))) == []
    assert list(read_metrics(run))[-1] == 12


def test_a_damaged_checkpoint_in_an_object_store_is_walked_past(s3: str, tmp_path: Path) -> None:
    remote = f"run_root={s3}/damaged"
    assert train(1, tmp_path, remote, "steps=8").codes == [0]
    run = RunFolder(f"{s3}/damaged/toy")
    file = "checkpoints/step-00000008-attempt-0001/rank-0000.tensors"
    data = bytearray(run.storage.read(file))
    data[100] ^= 4
    run.storage.write(file, bytes(data))
    ended = train(1, tmp_path, remote, "steps=12")
    assert ended.codes == [0], ended.printed
    assert run.storage.exists("checkpoints/step-00000008-attempt-0001/manifest.set-aside.json")


def test_a_bucket_that_is_not_there_is_one_clear_line(s3: str, tmp_path: Path) -> None:
    ended = train(2, tmp_path, "run_root=s3://no-such-bucket/runs")
    assert ended.codes == [2, 2]
    assert ended.printed.count("error:") == 1
    assert "no-such-bucket" in ended.printed
    assert "Traceback" not in ended.printed
