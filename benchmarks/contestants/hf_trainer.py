"""The Trainer of Hugging Face transformers, kept lean: no bar, no checkpoint, no reports but its own log."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, cosine, scratch


class WithLoss(nn.Module):
    """The Trainer wants a model that returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(features)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def named(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    features, target = batch
    return {"features": features, "labels": target}


def main() -> None:
    torch.manual_seed(0)
    model = WithLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    arguments = TrainingArguments(
        output_dir=str(scratch()),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=CLIP,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    Trainer(model, arguments, named, Batches(), optimizers=(optimizer, schedule)).train()


if __name__ == "__main__":
    main()
