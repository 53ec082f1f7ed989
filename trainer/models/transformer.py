"""Blocks of transformers: pre-norm attention and a feed-forward network, with GPT-2's initialisation."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention, then a two-layer network, each applied to the normed stream and added to it."""

    def __init__(self, width: int, heads: int, dropout: float, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, depth, causal)
        self.feed_norm = nn.LayerNorm(width)
        self.expand = linear(width, 4 * width)
        self.contract = linear(4 * width, width, std=residual_std(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        fed: Tensor = self.contract(F.gelu(self.expand(self.feed_norm(hidden))))
        out: Tensor = hidden + self.dropout(fed)
        return out


class Attention(nn.Module):
    """Self-attention with `heads` heads over hidden [n, t, width].

    With `mask`, bool [n, 1, t, t], position i attends to those j where mask[…, i, j] is True; without one to all, or if
    `causal` to those up to i.
    """

    def __init__(self, width: int, heads: int, dropout: float, depth: int, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.rate = dropout
        self.query_key_value = linear(width, 3 * width)
        self.project = linear(width, width, std=residual_std(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        samples, length, width = hidden.shape
        parts = self.query_key_value(hidden).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        causal = self.causal and mask is None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate, is_causal=causal)
        mixed = mixed.transpose(1, 2).reshape(samples, length, width)
        out: Tensor = self.dropout(self.project(mixed))
        return out


def linear(inputs: int, outputs: int, bias: bool = True, std: float = 0.02) -> nn.Linear:
    """Return a linear layer with GPT-2's initialisation."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def residual_std(depth: int) -> float:
    """Return GPT-2's initial deviation of layers that write to the residual stream.

    It shrinks with their number.
    """
    return 0.02 / math.sqrt(2 * depth)
