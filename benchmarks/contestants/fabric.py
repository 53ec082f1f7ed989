"""Lightning Fabric: the hand-written loop with Fabric's set-up, backward and clipping."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, as_it_comes, cosine, scratch, world


def main() -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=world(), strategy="ddp" if world() > 1 else "auto")
    fabric.launch()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Batches(), BATCH, shuffle=True, collate_fn=as_it_comes))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    with (scratch() / f"loss-{fabric.global_rank}.txt").open("w") as log:
        for step, (features, target) in zip(range(1, STEPS + 1), loader, strict=False):
            loss = cross_entropy(model(features), target)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                print(step, loss.item(), file=log, flush=True)


if __name__ == "__main__":
    main()
