"""A GPT after nanoGPT: learned positions, pre-norm blocks, and one matrix for tokens in and out."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep import Batch, Loss


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to what it reads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed, self.feed_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self._drop(self.attention_out(heard.transpose(1, 2).flatten(2)))
        return x + self._drop(self.feed_out(F.gelu(self.feed(self.norm_2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """Scores of the next token at each place: int64 [n, context] to float32 [n, context, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight  # tied: one parameter with two names
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deep = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if deep else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NextToken:
    """The task: predict each token from those before it."""

    unit = "tokens"

    def __init__(
        self,
        vocabulary: int = 1024,
        context: int = 128,
        width: int = 96,
        heads: int = 4,
        depth: int = 3,
        dropout: float = 0.1,
    ) -> None:
        self.shape = (vocabulary, context, width, heads, depth, dropout)

    def model(self) -> nn.Module:
        return GPT(*self.shape)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        tokens = batch["tokens"].long()  # [n, context + 1]
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(total, targets.numel())

    evaluate = loss
