"""The problem as Everstep's task, data and hook; benchmarks/conf names them."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.footprints import leave_footprint
from benchmarks.problem import WIDTH, Net, arrays
from everstep import ArrayDataset, Batch, Loss, Splits, StepInfo


class Problem:
    """Cross entropy of the ticking net."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width

    def model(self) -> nn.Module:
        return Net(self.width)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(cross_entropy(model(batch["features"]), batch["target"], reduction="sum"), len(batch["target"]))

    evaluate = loss


def splits() -> Splits:
    features, target = arrays()
    return Splits(ArrayDataset({"features": features.numpy(), "target": target.numpy()}))


class Watch:
    """A hook that does the least a hook can: it remembers the last loss."""

    def __init__(self) -> None:
        self.loss = float("nan")

    def __call__(self, info: StepInfo) -> None:
        self.loss = info.loss


class Footprints:
    """A hook that leaves a line for each step, from which the restart benchmark reads who came how far and when."""

    def __call__(self, info: StepInfo) -> None:
        leave_footprint(info.step)
