"""The loop that people write by hand: DataLoader, AdamW, clip_grad_norm_, LambdaLR, the loss to a file now and then."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Batches, Net, as_it_comes, cosine, scratch, world


def main(fused: bool | None = None) -> None:
    torch.manual_seed(0)
    model, data, sampler = Net(), Batches(), None
    if world() > 1:
        dist.init_process_group("gloo")
        model, sampler = DistributedDataParallel(model), DistributedSampler(data)
    loader = DataLoader(data, BATCH, shuffle=sampler is None, sampler=sampler, collate_fn=as_it_comes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    with (scratch() / f"loss-{dist.get_rank() if sampler else 0}.txt").open("w") as log:
        for step, (features, target) in zip(range(1, STEPS + 1), loader, strict=False):
            loss = cross_entropy(model(features), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                print(step, loss.item(), file=log, flush=True)
    if sampler is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
