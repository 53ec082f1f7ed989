"""`python -m everstep.trainer.preflight.gpu_check N`: test a product and an all-reduce on N GPUs.

Print one line if a GPU fails.
"""

from __future__ import annotations

import sys

import torch
from torch.cuda import nccl

SIZE = 2048


def main(count: int) -> int:
    devices = [torch.device("cuda", index) for index in range(count)]
    for device in devices:
        # Small whole numbers: the product is exact in every precision, so one wrong bit is detected.
        product = torch.full((SIZE, SIZE), 2.0, device=device) @ torch.ones((SIZE, SIZE), device=device)
        if not bool((product == 2.0 * SIZE).all()):
            return _bad(f"GPU {device.index} gives a wrong matrix product")
    shares = [torch.full((SIZE,), float(device.index + 1), device=device) for device in devices]
    if count > 1:
        nccl.all_reduce(shares)  # type: ignore[no-untyped-call]
        expected = count * (count + 1) / 2
        for share in shares:
            if not bool((share == expected).all()):
                return _bad(f"GPU {share.device.index} has a wrong sum after an all-reduce over {count} GPUs")
    return 0


def _bad(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
