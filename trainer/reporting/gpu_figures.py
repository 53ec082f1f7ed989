"""Figures of the GPUs that this job uses on its node, through NVML (package nvidia-ml-py, optional)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from everstep.trainer.reporting.host_figures import MIB, Figures

LOG = logging.getLogger("everstep")
THROTTLED = {
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
}
"""Bits of NVML for reasons to lower the clocks; the others are that a GPU is idle, or set so."""


class GpuMeter:
    """Reads the GPUs of this job; empty where there is no NVML, or none that works."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = _handles(pynvml, os.environ)
        except Exception as error:  # not installed, no driver, no GPU, or one that has fallen off the bus
            LOG.debug("no figures of GPUs: %s: %s", type(error).__name__, error)

    def sample(self) -> Figures:
        figures: Figures = {}
        for number, handle in enumerate(self._handles):
            for name, value in self._read(handle).items():
                figures[f"gpu{number}_{name}"] = value
        return figures

    def _read(self, handle: Any) -> Figures:
        """Return what this GPU has of the figures: virtual and small ones lack some."""
        nvml, figures = self._nvml, Figures()

        def put(read: Callable[[], Figures]) -> None:
            try:
                figures.update(read())
            except Exception as error:
                self._say_once(error)

        put(lambda: {"percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)})
        put(lambda: _memory(nvml.nvmlDeviceGetMemoryInfo(handle)))
        put(lambda: {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000})
        put(lambda: {"clock_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))})
        put(lambda: {"memory_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))})
        put(lambda: {"celsius": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))})
        put(lambda: _throttled(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        return figures

    _said = False

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            LOG.debug("a figure of a GPU is missing: %s: %s", type(error).__name__, error)

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.nvmlShutdown()


def _memory(found: Any) -> Figures:
    return {"memory_mb": round(found.used / MIB, 1), "memory_limit_mb": round(found.total / MIB, 1)}


def _throttled(bits: int) -> Figures:
    """Return 100 if a reason lowers the clocks, else 0, so that a mean is a share of the time; and why."""
    reasons = [name for bit, name in THROTTLED.items() if bits & bit]
    return {"throttled_percent": 100.0 if reasons else 0.0} | ({"throttled_by": " ".join(reasons)} if reasons else {})


def power_w(figures: Figures) -> float | None:
    """Return the power of all GPUs of a sample; None if none was read."""
    read = [value for name, value in figures.items() if name.endswith("_power_w") and isinstance(value, float)]
    return sum(read) if read else None


def _handles(nvml: Any, environment: Mapping[str, str]) -> list[Any]:
    """Return the GPUs of this job: those visible to it, of which each local rank uses one.

    NVML does not know CUDA_VISIBLE_DEVICES, which holds numbers, or the beginnings of UUIDs. A part of a GPU (MIG)
    counts as the GPU.
    """
    everything = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = everything if visible is None else _visible(nvml, everything, visible)
    ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    return chosen[: int(ranks)] if ranks.isdigit() else chosen


def _visible(nvml: Any, everything: list[Any], visible: str) -> list[Any]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names; an unknown one ends the list, as in CUDA."""
    found: list[Any] = []
    for word in (word.strip() for word in visible.split(",")):
        if word.isdigit():
            named = everything[int(word) : int(word) + 1]
        elif word.startswith("MIG-"):
            named = [nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(word))]
        else:
            named = [each for each in everything if word and nvml.nvmlDeviceGetUUID(each).startswith(word)]
        if len(named) != 1:
            break
        found += named
    return found
