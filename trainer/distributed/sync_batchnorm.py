"""Batch normalisation over the microbatches of all ranks, on any device (torch's own needs a GPU)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everstep.errors import ConfigError


class SyncBatchNorm(_BatchNorm):
    """Normalises [n, c, …] by the mean and variance of each channel over all samples on all ranks."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (samples, channels), got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        mean, var, count = _statistics(input)
        if self.track_running_stats:
            self._update(mean.detach(), var.detach(), count)
        shape = [1, -1, *([1] * (input.dim() - 2))]
        output = (input - mean.view(shape).to(input.dtype)) * torch.rsqrt(var + self.eps).view(shape).to(input.dtype)
        if self.weight is None:
            return output
        return output * self.weight.view(shape) + self.bias.view(shape)

    def _update(self, mean: Tensor, var: Tensor, count: float) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked or 1)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((var * (count / max(1.0, count - 1))).to(self.running_var.dtype), share)


def convert(model: nn.Module) -> nn.Module:
    """Convert each BatchNorm1d, 2d and 3d to SyncBatchNorm in place; other attributes do not change.

    Raises:
        ConfigError: a user's class overrides `forward()`, which would be lost.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            continue
        if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            kind = type(module).__name__
            raise ConfigError(
                f"parallel.sync_batchnorm=true: the model has a {kind} at {path!r}, whose own forward() would be lost; "
                "use a BatchNorm of torch.nn, or set it to false"
            )
        module.__class__ = SyncBatchNorm  # type: ignore[assignment]
    return model


def convert_torchs(model: nn.Module) -> nn.Module:
    """Convert torch's SyncBatchNorm to ours, which needs no GPU, in place.

    Those with a process group of their own are not converted.
    """
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm and module.process_group in (None, dist.group.WORLD):
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]
    return model


def _statistics(input: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return (mean, biased variance, samples) of each channel over all ranks, in fp32 or more."""
    values = input if input.dtype in (torch.float32, torch.float64) else input.float()
    dims = [dim for dim in range(values.dim()) if dim != 1]
    count = torch.full((1,), values.numel() / values.shape[1], dtype=values.dtype, device=values.device)
    total = _sum(torch.cat([values.sum(dims), count]))
    mean, number = total[:-1] / total[-1].detach(), float(total[-1].detach())
    shape = [1, -1, *([1] * (values.dim() - 2))]
    var = _sum((values - mean.view(shape)).square().sum(dims)) / number
    return mean, var, number


def _sum(tensor: Tensor) -> Tensor:
    summed: Tensor = _AllReduce.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


class _AllReduce(torch.autograd.Function):
    """Sum over all ranks, and in the backward pass the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _reduced(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _reduced(gradients[0])


def _reduced(tensor: Tensor) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
