"""A small checkpoint of one process, for tests that look at it, damage it or make it hostile."""

from __future__ import annotations

import json

import torch
from blake3 import blake3

from everstep.config import CheckpointConfig
from everstep.rank_env import RankInfo
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.checkpointer import Checkpointer
from everstep.trainer.checkpoint.manifest import ManifestFacts, parse_name
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.optim import build_optimizer
from everstep.trainer.state.train_state import Progress, TrainState


def saved(run: RunFolder) -> tuple[Checkpointer, str]:
    """A small model with its optimizer, saved at step 4 by one process; with the checkpoint's path."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer({"_target_": "torch.optim.AdamW", "lr": 0.1}, model, ())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer, Progress(step=4))
    attempt = run.claim({})
    facts = ManifestFacts(attempt, 8, "single", config_digest="config", data_digest="data")
    checkpoints = Checkpointer(CheckpointConfig(), facts, run, Mesh(RankInfo(), torch.device("cpu")), state)
    assert checkpoints.save()
    assert checkpoints.finish()
    return checkpoints, run.checkpoint(4, attempt)


def newest_step(run: RunFolder) -> int:
    """The step of the newest checkpoint whose files all verify."""
    found = parse_name(locate(run.url)[1].rsplit("/", 1)[-1])
    assert found is not None
    return found[0]


def reseal(run: RunFolder, path: str) -> None:
    """Make the manifest fit what the files now are, as somebody hostile would."""
    tree = json.loads(run.storage.read(f"{path}/{MANIFEST}"))
    for name in tree["files"]:
        data = run.storage.read(f"{path}/{name}")
        tree["files"][name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}
    run.storage.write(f"{path}/{MANIFEST}", json.dumps(tree).encode())
