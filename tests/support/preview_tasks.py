"""Tasks that differ from the toy in what they show."""

from __future__ import annotations

from torch import nn

from support.toy import ToyTask


class Raising(ToyTask):
    def preview(self, model: nn.Module) -> str:
        raise AttributeError("no such thing")


class Says(ToyTask):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def preview(self, model: nn.Module) -> str:
        return self.text


class Frozen(ToyTask):
    """A first block that is not trained."""

    def model(self) -> nn.Module:
        model = super().model()
        model.blocks[0].requires_grad_(False)
        return model
