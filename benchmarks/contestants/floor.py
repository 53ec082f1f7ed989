"""The least that trains this problem with clipping: fused AdamW, rows by index, no schedule, losses read at the end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.problem import BATCH, CLIP, LOG_EVERY, LR, STEPS, Net, arrays, scratch, world


def main() -> None:
    torch.manual_seed(0)
    model, (features, target), rank = Net(), arrays(), 0
    parameters = list(model.parameters())
    if world() > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    rows = torch.randperm(len(target))[rank :: world()].split(BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    losses = []
    for step in range(STEPS):
        loss = cross_entropy(model(features[rows[step]]), target[rows[step]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            losses.append(loss.detach())
    (scratch() / f"loss-{rank}.txt").write_text("\n".join(str(loss.item()) for loss in losses))
    if world() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
