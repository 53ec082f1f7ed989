"""A user's project whose files are named as Everstep's once were, or as anybody's are."""

from __future__ import annotations

from pathlib import Path

FILES = ("trainer.py", "launch/__init__.py", "data/__init__.py", "datasets/__init__.py", "tests/__init__.py",
         "utils.py", "config.py", "conf/__init__.py", "everstep.yaml", "everstep/notes.txt",
         "slurm/run.sbatch")  # fmt: skip
TRAP = "raise SystemExit('a file of the user was run')\n"
PLUGIN = """
from trainer import width
from everstep import ArrayDataset, Loss, Splits
import numpy as np
from torch import nn


class Task:
    def model(self):
        return nn.Linear(width, 1)

    def loss(self, model, batch):
        return Loss((model(batch["x"])[:, 0] - batch["y"]).square().sum(), len(batch["y"]))

    evaluate = loss


def data():
    x = np.random.default_rng(0).normal(size=(32, width)).astype("float32")
    return Splits(ArrayDataset({"x": x, "y": x.sum(1)}))
"""
EXPERIMENT = """# @package _global_
task: {_target_: mine.Task}
data: {_target_: mine.data}
steps: 4
global_batch: 8
micro_batch: 4
optimizer: {lr: 0.05}
evaluate: {every: null}
"""
OWN = ("--config-dir", "conf", "experiment=mine", "plugins=[mine]")
"""Words of `submit` for a run with the plug-in of the project, which imports the project's own `trainer`."""
BUILT_IN = ("--quick", "experiment=breast_cancer", "steps=4", "evaluate.every=null")
"""Words of `submit` for a run that needs none of the project's files: one that is run was taken for one of Everstep's.

Quick, as the other has rehearsed already.
"""


def lay_out(project: Path) -> Path:
    for name in FILES:
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TRAP if name.endswith(".py") else "")
    (project / "trainer.py").write_text("width = 3\n")
    (project / "mine.py").write_text(PLUGIN)
    (project / "conf/experiment").mkdir()
    (project / "conf/experiment/mine.yaml").write_text(EXPERIMENT)
    return project
