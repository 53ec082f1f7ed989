"""Two small towers that map images and texts to vectors of one space, for contrastive training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError
from everstep.trainer.models.convnet import ConvBlock

MOST_SCALE = 100.0
"""Limit of the inverse temperature, as in CLIP: beyond it the loss has steps."""


class ImageText(nn.Module):
    """Images and texts -> {"image": [n, dim], "text": [n, dim]}.

    Images are float32 [n, channels, size, size], texts words int64 [n, t]: numbers from 1, and 0 for padding. The
    vectors have the length 1; those of images are multiplied by the inverse temperature, which is trained: the products
    with those of texts are the logits.
    """

    def __init__(
        self,
        vocab: int,
        size: int = 32,
        channels: int = 1,
        width: int = 16,
        depth: int = 3,
        dim: int = 64,
        groups: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if size % 2**depth:
            raise ConfigError(f"model.size={size} is not a multiple of 2 ** model.depth={2**depth}")
        if width % groups:
            raise ConfigError(f"model.width={width} is not a multiple of model.groups={groups}")
        widths = [channels, *(width * 2**level for level in range(depth))]
        self.blocks = nn.ModuleList(ConvBlock(widths[n], widths[n + 1], groups, 2) for n in range(depth))
        self.image_head = nn.Linear(widths[-1] * (size // 2**depth) ** 2, dim)
        self.dropout = nn.Dropout(dropout)
        self.words = nn.Embedding(vocab, dim)
        self.text_head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        hidden = image
        for block in self.blocks:
            hidden = block(hidden)
        seen = F.normalize(self.image_head(self.dropout(hidden.flatten(1))), dim=1)
        real = (words > 0).unsqueeze(2)
        mean = (self.words(words) * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        read = F.normalize(mean + self.text_head(self.dropout(mean)), dim=1)
        return {"image": seen * self.log_scale.exp().clamp(max=MOST_SCALE), "text": read}
