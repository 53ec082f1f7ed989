"""Classification of documents of different lengths: a transformer whose padding has no effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError
from everstep.trainer.task import Batch, Loss
from everstep.trainer.tasks.classification import classification_loss, with_accuracy


class DocumentClassifier:
    """Batches hold `tokens` [n, t], `lengths` int64 [n] and `label` int64 [n].

    A column `most_frequent` int64 [n], if there is one, is a trivial guess, measured as `baseline_accuracy`.
    """

    unit = "documents"

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self._build = model

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy, summed over the documents."""
        return classification_loss(model(batch["tokens"], batch["lengths"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `accuracy`, and that of the trivial guess."""
        loss = with_accuracy(model(batch["tokens"], batch["lengths"]), batch["label"])
        if "most_frequent" not in batch:
            return loss
        trivial = (batch["most_frequent"] == batch["label"]).sum().to(loss.sum.dtype)
        return Loss(loss.sum, loss.count, {**loss.metrics, "baseline_accuracy": trivial})

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `label`, the most likely class [n], and `probability` of each class [n, classes]."""
        logits = model(batch["tokens"], batch["lengths"])
        return {"label": logits.argmax(dim=1), "probability": logits.softmax(dim=1)}


class TextEncoder(nn.Module):
    """Tokens [n, t] of any size and their number int64 [n] -> logits [n, classes].

    A token's embedding is that of its remainder by `vocab`. Tokens beyond `lengths` are padding: they are masked in
    the attention and in the mean over tokens.
    """

    def __init__(
        self,
        classes: int,
        vocab: int = 8192,
        width: int = 64,
        depth: int = 1,
        heads: int = 4,
        context: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"model.width={width} is not a multiple of model.heads={heads}")
        self.vocab, self.context = vocab, context
        self.words = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        width = tokens.shape[1]
        if width > self.context:
            raise ConfigError(
                f"a document of {width} tokens is longer than model.context={self.context}; "
                "choose a smaller data.max_length or a larger model.context"
            )
        places = torch.arange(width, device=tokens.device)
        real = places < lengths[:, None]
        hidden = self.dropout(self.words(tokens.long() % self.vocab) + self.positions(places))
        for block in self.blocks:
            hidden = block(hidden, real)
        kept = self.norm(hidden) * real[:, :, None]
        logits: Tensor = self.head(self.dropout(kept.sum(dim=1) / lengths[:, None]))
        return logits


class EncoderBlock(nn.Module):
    """Attention over the real tokens, then a two-layer network, each added to the stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        """Return the stream [n, t, width]; `real` [n, t] is False for padding."""
        parts = self.query_key_value(self.attention_norm(hidden)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])
        hidden = hidden + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = hidden + self.dropout(self.feed(self.feed_norm(hidden)))
        return out
