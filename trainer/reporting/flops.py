"""How much arithmetic a step is, and how much the device could do: what MFU is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "A10": 125, "V100": 125}
"""Dense bf16 (V100: fp16) tensor-core peaks from NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the device can do at most; None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `work` does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
