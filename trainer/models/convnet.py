"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn

from everstep.errors import ConfigError


class ConvNet(nn.Module):
    """Images float32 [n, channels, h, w] -> logits [n, classes].

    GroupNorm, not BatchNorm: running statistics would depend on how the batch is split into microbatches.
    """

    def __init__(
        self,
        width: int = 32,
        depth: int = 3,
        channels: int = 1,
        classes: int = 10,
        groups: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % groups:
            raise ConfigError(f"model.width={width} is not a multiple of model.groups={groups}")
        # The resolution is halved once, after the first block.
        self.blocks = nn.ModuleList(
            ConvBlock(channels if level == 0 else width, width, groups, 2 if level == 1 else 1)
            for level in range(depth)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        hidden = image
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.dropout(hidden.amax(dim=(2, 3))))
        return logits


class ConvBlock(nn.Sequential):
    """Convolution, norm and activation."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
            nn.GroupNorm(groups, outputs),
            nn.GELU(),
        )
