"""`python -m everstep.trainer.preflight.link_check`: time an all-reduce, under torchrun."""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

BYTES = 64 << 20
TIMES = 4


def main() -> int:
    devices = torch.cuda.device_count()
    backend = "nccl" if devices > 1 else "gloo"
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if devices > 1 else torch.device("cpu")
    share = torch.full((BYTES // 4,), rank + 1.0, device=device)
    seconds = min(_timed(share.clone(), world * (world + 1) / 2) for _ in range(TIMES))
    if rank == 0:
        facts = {
            "torch": torch.__version__,
            "devices": devices,
            "name": torch.cuda.get_device_name(0) if devices else "",
            "backend": backend,
            "gb_per_s": round(BYTES / 1e9 / seconds, 2),
        }
        print(json.dumps(facts), flush=True)
    dist.destroy_process_group()
    return 0


def _timed(share: torch.Tensor, expected: float) -> float:
    """Return the seconds of one all-reduce.

    Raises:
        RuntimeError: the sum is wrong.
    """
    began = time.perf_counter()
    dist.all_reduce(share)
    if share.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not bool((share == expected).all()):
        raise RuntimeError("an all-reduce gives a wrong sum")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
