"""A small vision transformer: patches of an image as tokens, pre-norm blocks, the mean of them all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.models.transformer import Block, linear


class VisionTransformer(nn.Module):
    """Images float32 [n, channels, size, size] -> logits [n, classes].

    Patches overlap: each sees half a patch more on each side, without which so few images do not teach the model which
    pixels are neighbours.
    """

    def __init__(
        self,
        size: int = 8,
        patch: int = 2,
        width: int = 48,
        depth: int = 2,
        heads: int = 4,
        channels: int = 1,
        classes: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ConfigError(f"model.size={size} is not a multiple of model.patch={patch}")
        if width % heads:
            raise ConfigError(f"model.width={width} is not a multiple of model.heads={heads}")
        self.size = size
        self.patches = nn.Conv2d(channels, width, patch + 2 * (patch // 2), stride=patch, padding=patch // 2)
        self.positions = nn.Parameter(torch.empty((size // patch) ** 2, width))
        nn.init.normal_(self.positions, std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for block in (Block(width, heads, dropout, depth, causal=False) for _ in range(depth)):
            # GPT-2's deviation of 0.02 suits a width of 768 or more; layers this narrow learn slowly from it.
            for layer in (block.attention.query_key_value, block.expand):
                nn.init.normal_(layer.weight, std=width**-0.5)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != (self.size, self.size):
            raise ConfigError(f"model.size={self.size}: the images are of {image.shape[-2]} × {image.shape[-1]} pixels")
        # [n, width, rows, columns] -> [n, patches, width]
        hidden = self.dropout(self.patches(image).flatten(2).transpose(1, 2) + self.positions)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden.mean(dim=1)))
        return logits
