"""Hooks that look at the model, the batch, the outputs and the gradients, and hooks that fail."""

from __future__ import annotations

import json
import os

import numpy as np
import torch

from everstep import ConfigError, StepInfo, every, log_histogram, log_image, log_text


def _write(file: str, record: object) -> None:
    with open(f"{file}-{os.environ.get('RANK', '0')}.jsonl", "a") as lines:
        lines.write(json.dumps(record) + "\n")


@every(3, gradients=True, batch=True, outputs=True)
class Sees:
    """Writes down what it sees, at every third step."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, info: StepInfo) -> None:
        assert info.model is not None
        assert info.batch is not None
        seen = {
            "step": info.step,
            "norm": info.norm,
            "gradients": dict(info.gradients),
            "rows": len(info.batch["y"]),
            "outputs": list(info.outputs.shape),
            "needs_graph": info.outputs.requires_grad,
            "names": [name for name, _ in info.model.named_parameters()],
        }
        _write(self.file, seen)


class SeesNumbers:
    """Asks for nothing, and gets numbers."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, info: StepInfo) -> None:
        _write(self.file, [info.step, info.model is None, dict(info.gradients)])


def logs(info: StepInfo) -> None:
    log_text("note", f"loss at step {info.step}")
    log_image("picture", np.full((2, 2), info.step, np.uint8))
    log_histogram("spread", torch.arange(10.0))


def logs_floats(info: StepInfo) -> None:
    log_image("picture", torch.zeros(2, 2))


class Fails:
    """Fails at one step, on one rank or on all."""

    def __init__(self, step: int, rank: int | None = None) -> None:
        self.step, self.rank = step, rank

    def __call__(self, info: StepInfo) -> None:
        if info.step >= self.step and self.rank in (None, int(os.environ.get("RANK", "0"))):
            raise ValueError("the hook is broken")


@every(2)
def refuses(info: StepInfo) -> None:
    raise ConfigError("hook.key=3: cannot be; set 2")
