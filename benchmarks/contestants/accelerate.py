"""Accelerate: the hand-written loop with everything prepared by the Accelerator."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, as_it_comes, cosine, scratch


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loader = DataLoader(Batches(), BATCH, shuffle=True, collate_fn=as_it_comes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    with (scratch() / f"loss-{accelerator.process_index}.txt").open("w") as log:
        for step, (features, target) in zip(range(1, STEPS + 1), loader, strict=False):
            with accelerator.accumulate(model):
                loss = cross_entropy(model(features), target)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                print(step, loss.item(), file=log, flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
