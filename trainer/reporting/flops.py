"""Floating-point operations of a step and peak rate of the device, from which MFU is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "A10": 125, "V100": 125}
"""Dense bf16 (V100: fp16) tensor-core peaks from NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak operations per second of the device; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def count_flops(work: Callable[[], object]) -> int:
    """Return the floating-point operations of the matrix products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
