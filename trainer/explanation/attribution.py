"""Attributions of one output to one input, by captum, with what they lack to be complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everstep.trainer.explanation.model_inputs import ModelInput
from everstep.trainer.explanation.target import scores

PASS_SAMPLES = 256
"""Samples of a pass of integrated gradients: memory does not grow with the points of the path."""
WINDOW_SHARE = 8
"""Occlusion covers this part of the height and of the width of an image at a time."""


@dataclass(frozen=True)
class Attribution:
    """Attributions of a column of all samples."""

    column: str
    raw: Tensor
    """Argument: [n, …]."""
    values: Tensor
    """[n, …], of embeddings summed over their width."""
    output: Tensor
    """Explained output of each sample, [n]."""
    baseline_output: Tensor
    """The same with this column at its baseline, [n]."""

    @property
    def delta(self) -> Tensor:
        """Return sum of attributions - (output - baseline output) of each sample, [n]: 0 if they are complete."""
        return self.values.double().reshape(len(self.values), -1).sum(dim=1) - (self.output - self.baseline_output)


def attribute(
    model: nn.Module, arguments: Mapping[str, Any], given: ModelInput, target: Tensor, method: str, points: int
) -> Attribution:
    """Return the attributions of the outputs `target` int64 [n]; the baseline is 0 everywhere."""
    run = given.forward(model, list(arguments))

    def explained(values: Tensor, chosen: Tensor, *rest: Any) -> Tensor:
        return scores(run(values, *rest)).gather(1, chosen[:, None])[:, 0]

    extra = (target, *arguments.values())
    with torch.no_grad():
        output = explained(given.values, *extra).double()
        baseline = explained(torch.zeros_like(given.values), *extra).double()
    with torch.enable_grad():
        found = METHODS[method](explained, given, extra, points).detach()
    if given.embedding is not None:
        found = found.sum(dim=-1)
    return Attribution(given.column, given.raw, found, output, baseline)


def _integrated(explained: Callable[..., Tensor], given: ModelInput, extra: Sequence[Any], points: int) -> Tensor:
    from captum.attr import IntegratedGradients

    found: Tensor = IntegratedGradients(explained).attribute(
        given.values,
        baselines=torch.zeros_like(given.values),
        additional_forward_args=tuple(extra),
        n_steps=points,
        internal_batch_size=max(PASS_SAMPLES, len(given.values)),
    )
    return found


def _gradient(explained: Callable[..., Tensor], given: ModelInput, extra: Sequence[Any], points: int) -> Tensor:
    from captum.attr import InputXGradient

    values = given.values.clone().requires_grad_()
    found: Tensor = InputXGradient(explained).attribute(values, additional_forward_args=tuple(extra))
    return found


def _occlusion(explained: Callable[..., Tensor], given: ModelInput, extra: Sequence[Any], points: int) -> Tensor:
    from captum.attr import Occlusion

    window = _window(given)
    found: Tensor = Occlusion(explained).attribute(
        given.values, window, strides=window, baselines=0, additional_forward_args=tuple(extra)
    )
    return found / torch.tensor(window).prod()  # captum gives each element the whole difference of its window


def _window(given: ModelInput) -> tuple[int, ...]:
    """Return the shape that is covered at a time: a patch of an image, a token, or a number."""
    shape = given.values.shape[1:]
    if given.embedding is not None:
        return (*(1 for _ in shape[:-1]), shape[-1])
    if len(shape) == 3:
        return shape[0], max(1, shape[1] // WINDOW_SHARE), max(1, shape[2] // WINDOW_SHARE)
    return tuple(1 for _ in shape)


METHODS: Mapping[str, Callable[..., Tensor]] = {
    "integrated_gradients": _integrated,
    "gradient_x_input": _gradient,
    "occlusion": _occlusion,
}
