"""A small GPT over bytes: pre-norm causal blocks, learned positions, an untied head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError


class GPT(nn.Module):
    """Tokens int64 [n, t] with t up to `context` -> logits [n, t, vocab].

    Attributes: `blocks` (nn.ModuleList, the unit of sharding and checkpointing), `context`.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        context: int = 64,
        vocab: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"model.width={width} is not a multiple of model.heads={heads}")
        self.context = context
        self.embedding = Embedding(vocab, context, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ConfigError(
                f"a sequence of {tokens.shape[1]} tokens is longer than model.context={self.context}; "
                "choose a smaller data.block or a larger model.context"
            )
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Embedding(nn.Module):
    """Sum of a token's embedding and that of its position."""

    def __init__(self, vocab: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden: Tensor = self.dropout(self.tokens(tokens) + self.positions(places))
        return hidden


class Block(nn.Module):
    """Attention, then a two-layer network, each applied to the normed stream and added to it."""

    def __init__(self, width: int, heads: int, dropout: float, depth: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, depth)
        self.feed_norm = nn.LayerNorm(width)
        self.expand = linear(width, 4 * width)
        self.contract = linear(4 * width, width, std=residual_std(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        fed: Tensor = self.contract(F.gelu(self.expand(self.feed_norm(hidden))))
        out: Tensor = hidden + self.dropout(fed)
        return out


class Attention(nn.Module):
    """Causal self-attention with `heads` heads."""

    def __init__(self, width: int, heads: int, dropout: float, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.query_key_value = linear(width, 3 * width)
        self.project = linear(width, width, std=residual_std(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        samples, length, width = hidden.shape
        parts = self.query_key_value(hidden).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
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
