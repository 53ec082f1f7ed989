"""MosaicML's Composer, kept lean: no bar, no checkpoint, losses to its file logger."""

from __future__ import annotations

import torch
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.loggers import FileLogger
from composer.models import ComposerModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, as_it_comes, cosine, scratch


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(outputs, batch[1])


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    Trainer(
        model=model,
        train_dataloader=DataLoader(Batches(), BATCH, shuffle=True, collate_fn=as_it_comes),
        optimizers=optimizer,
        schedulers=torch.optim.lr_scheduler.LambdaLR(optimizer, cosine),
        step_schedulers_every_batch=True,
        max_duration=f"{STEPS}ba",
        algorithms=[GradientClipping("norm", CLIP)],
        loggers=[FileLogger(filename=str(scratch() / "loss.txt"), flush_interval=LOG_EVERY)],
        progress_bar=False,
        device="cpu",
    ).fit()


if __name__ == "__main__":
    main()
