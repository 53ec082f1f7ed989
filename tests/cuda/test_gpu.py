"""What only a GPU shows: saves staged in pinned memory, batches from it, a run that resumes to the same bits."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.config import LoaderConfig
from everstep.rank_env import RankInfo
from everstep.trainer.checkpoint.layout import lay_out
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.staging import Staging
from everstep.trainer.checkpoint.tools.diff import differences
from everstep.trainer.data.dataset import ArrayDataset
from everstep.trainer.data.fetcher import Fetcher
from everstep.trainer.data.loader import Loader
from everstep.trainer.data.ordering.order import SampleOrder
from everstep.trainer.distributed.mesh import Mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = torch.device("cuda", 0)


def test_a_save_is_staged_in_pinned_memory_and_training_may_change_the_original_at_once() -> None:
    tensors = {
        "weight": torch.randn(300, 1000, device=DEVICE),
        "half": torch.randn(7, 3, device=DEVICE).to(torch.bfloat16),
        "on_the_cpu": torch.arange(5),
    }
    kept = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    layout, staging = lay_out(tensors, Mesh(RankInfo(), DEVICE)), Staging(DEVICE)
    staging.make_room(layout.bytes)
    for _ in range(2):  # the second save uses the buffer of the first
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
        staging.fill(layout, tensors)
        for tensor in tensors.values():
            tensor.zero_()
        assert staging.buffer.is_pinned()
        assert len(staging.buffer) == layout.bytes
        content = torch.frombuffer(bytearray(staging.bytes(layout.bytes)), dtype=torch.uint8)
        for piece, name in zip(layout.pieces, [piece.item.index.fqn for piece in layout.pieces], strict=True):
            found = content[piece.start : piece.start + piece.length].view(piece.dtype).view(piece.sizes)
            assert torch.equal(found, kept[name])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_on_the_gpu_and_are_those_of_the_cpu(prefetch: int) -> None:
    gather = Fetcher(ArrayDataset({"x": np.arange(120, dtype=np.float32).reshape(40, 3)}), seed=0)
    loaders = [
        Loader(gather, SampleOrder(40, 8, 0), 4, RankInfo(), device, LoaderConfig(prefetch=prefetch))
        for device in (DEVICE, "cpu")
    ]
    for there, here in islice(zip(*(loader.steps(0) for loader in loaders), strict=True), 7):
        for one, other in zip(there, here, strict=True):
            assert one.batch["x"].device == DEVICE
            assert torch.equal(one.batch["x"].cpu(), other.batch["x"])
    for loader in loaders:
        loader.close()


@pytest.mark.process
def test_a_run_on_a_gpu_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def train(name: str, steps: int) -> None:
        words = ["experiment=digits", f"run={name}", f"run_root={tmp_path}", f"steps={steps}", "checkpoint.every=10"]
        done = subprocess.run(
            [sys.executable, "-m", "everstep.trainer", *words], capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        assert "cuda" in done.stdout + done.stderr

    train("straight", 40)
    for steps in (20, 40):
        train("in_two", steps)
    assert list(differences(locate(str(tmp_path / "straight")), locate(str(tmp_path / "in_two")))) == []


@pytest.mark.process
def test_the_check_of_a_node_passes_on_gpus_that_compute() -> None:
    argv = [sys.executable, "-m", "everstep.trainer.preflight.gpu_check", str(torch.cuda.device_count())]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
