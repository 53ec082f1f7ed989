"""Lightning's Trainer, kept lean: no bar, no summary, no checkpoint, losses to its CSV logger."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, as_it_comes, cosine, scratch, world


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        features, target = batch
        loss = cross_entropy(self.net(features), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world(),
        strategy="ddp" if world() > 1 else "auto",
        max_steps=STEPS,
        gradient_clip_val=CLIP,
        logger=CSVLogger(scratch(), flush_logs_every_n_steps=LOG_EVERY),
        log_every_n_steps=LOG_EVERY,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(Batches(), BATCH, shuffle=True, collate_fn=as_it_comes))


if __name__ == "__main__":
    main()
