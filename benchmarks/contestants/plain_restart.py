"""The hand-written loop on two ranks that saves now and then and goes on from that, as torchrun's manual shows.

Its samples begin anew after a restart: it has no order that it could enter in the middle.
"""

from __future__ import annotations

import os
from itertools import chain, repeat

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.footprints import leave_footprint
from benchmarks.problem import BATCH, CLIP, LR, Batches, Net, as_it_comes, cosine, scratch

EVERY = int(os.environ["BENCH_SAVE_EVERY"])


def main() -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    net, data = Net(), Batches()
    model = DistributedDataParallel(net)
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data), collate_fn=as_it_comes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    saved, step = scratch() / "saved.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        step = state["step"]
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for features, target in chain.from_iterable(repeat(loader)):
        loss = cross_entropy(model(features), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        leave_footprint(step)
        if step % EVERY == 0 and dist.get_rank() == 0:
            state = {"step": step, "model": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "schedule": schedule.state_dict()}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)


if __name__ == "__main__":
    main()
