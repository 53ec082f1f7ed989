"""A checkpoint for other programs: read by plain DCP, verified; exported without what was frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from everstep import CheckpointReader
from everstep.errors import CheckpointError, ConfigError
from everstep.run_folder import RunFolder
from everstep.trainer.checkpoint.tools.diff import export
from support.resume_checks import last, state, zoo
from support.saved_checkpoint import saved

FROZEN = 'optimizer.groups=[{match: "net.0.*", frozen: true}]'


def test_plain_dcp_reads_a_checkpoint_and_a_run(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    checkpoints, path = saved(run)
    for url in (run.url, f"{run.url}/{path}"):
        model = torch.nn.Linear(3, 2)
        dcp.load({"model": model.state_dict()}, storage_reader=CheckpointReader(url), no_dist=True)
        for name, value in checkpoints.state.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_a_damaged_file_and_a_folder_without_one_are_refused(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    _, path = saved(run)
    reader = CheckpointReader(f"{run.url}/{path}")
    entries = reader.read_metadata().storage_data
    name = next(chunk.file for index, chunk in entries.items() if index.fqn == "model.weight")
    data = bytearray(run.storage.read(f"{path}/{name}"))
    data[0] ^= 1
    run.storage.write(f"{path}/{name}", bytes(data))
    with pytest.raises((CheckpointError, CheckpointException), match="does not match its BLAKE3"):
        dcp.load({"model": torch.nn.Linear(3, 2).state_dict()}, storage_reader=reader, no_dist=True)
    with pytest.raises((CheckpointError, CheckpointException), match="no checkpoint that can be read"):
        CheckpointReader(tmp_path / "nothing").read_metadata()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "kind"), [(1, "single"), (2, "fsdp")])
def test_an_export_of_what_was_trained_leaves_out_what_was_frozen(tmp_path: Path, world: int, kind: str) -> None:
    assert set(zoo(world, tmp_path, kind, FROZEN).codes) == {0}
    run, path = last(tmp_path, "straight")
    assert export(run, path, "model", str(tmp_path / "w.safetensors"), only_trained=True) == 2
    found, whole = load_file(tmp_path / "w.safetensors"), state(tmp_path, "straight")
    assert sorted(found) == ["net.2.bias", "net.2.weight"]
    assert all(torch.equal(value, whole[f"model.{name}"]) for name, value in found.items())


def test_an_optimizer_without_state_says_that_nothing_is_known(tmp_path: Path) -> None:
    assert zoo(1, tmp_path, "single", "optimizer=bare").codes == [0]
    run, path = last(tmp_path, "straight")
    with pytest.raises(ConfigError, match="keeps no state for a parameter, so what was trained is not known"):
        export(run, path, "model", str(tmp_path / "w.safetensors"), only_trained=True)
