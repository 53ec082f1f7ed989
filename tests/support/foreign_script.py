"""A program of somebody else's, as torchrun starts it: sums its rank over all processes, and looks for a secret."""

import os
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
told = os.environ.get("PLANTED_SECRET", "")
print(f"{sys.argv[1:]} sum {total.item()} of {dist.get_world_size()}, secret of {len(told)} letters", flush=True)
dist.destroy_process_group()
