"""A small GPT over bytes: pre-norm causal blocks, learned positions, an untied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.models.transformer import Block, linear


class GPT(nn.Module):
    """Tokens int64 [n, t] with t up to `context` -> logits [n, t, vocab].

    With `segments`, integers [n, t], a token attends to those of its own segment only, and `positions`, int64 [n, t],
    are counted in each: the logits are those of each document alone.

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

    def forward(self, tokens: Tensor, segments: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ConfigError(
                f"a sequence of {tokens.shape[1]} tokens is longer than model.context={self.context}; "
                "choose a smaller data.block or a larger model.context"
            )
        mask = None if segments is None else document_mask(segments)
        hidden = self.embedding(tokens, positions)
        for block in self.blocks:
            hidden = block(hidden, mask)
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

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        hidden: Tensor = self.dropout(self.tokens(tokens) + self.positions(places))
        return hidden


def document_mask(segments: Tensor) -> Tensor:
    """Return a mask bool [n, 1, t, t]: True where j is not after i and of the same segment."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril().unsqueeze(1)
