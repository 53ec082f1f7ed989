"""Recommendation of items to users by embedding tables, ranked over the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError
from everstep.trainer.task import Batch, Loss


class Recommendation:
    """Batches hold `user` and `item`, int64 [n].

    Held-out ones may hold `seen`, int64 [n, any], items that are not ranked for the user, and `popularity_rank`, int64
    [n], the item's rank by popularity, measured as `baseline_recall_at_K`.

    Args:
        model: makes a network of `user` -> a score of every item [n, items].
        top: number of items that are recommended.
    """

    unit = "pairs"

    def __init__(self, model: Callable[[], nn.Module], top: int = 10) -> None:
        self._build = model
        self.top = top
        if top < 1:
            raise ConfigError(f"task.top={top} must be at least 1 item")

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy of the item among the whole catalogue, summed over the pairs."""
        total = F.cross_entropy(model(batch["user"]), batch["item"], reduction="sum")
        return Loss(total, len(batch["item"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `recall_at_K`: the share of items that are among the K best of the catalogue."""
        scores, item = model(batch["user"]), batch["item"]
        own = scores.gather(1, item[:, None])
        # The item itself is never `seen`; one with an equal score counts as better, so equal scores earn nothing.
        better = (_unseen(scores, batch) >= own).sum(dim=1) - 1
        metrics = {f"recall_at_{self.top}": (better < self.top).sum().to(scores.dtype)}
        if "popularity_rank" in batch:
            trivial = (batch["popularity_rank"] < self.top).sum()
            metrics[f"baseline_recall_at_{self.top}"] = trivial.to(scores.dtype)
        return Loss(F.cross_entropy(scores, item, reduction="sum"), len(item), metrics)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `items`, the best ones that the user has not seen [n, top], and their `scores` [n, top]."""
        scores, items = _unseen(model(batch["user"]), batch).topk(self.top, dim=1)
        return {"items": items, "scores": scores}


def _unseen(scores: Tensor, batch: Batch) -> Tensor:
    """Return the scores with the items that the user has seen at the end of the ranking."""
    return scores.scatter(1, batch["seen"], -torch.inf) if "seen" in batch else scores


class MatrixFactorization(nn.Module):
    """Users int64 [n] -> scores of all items [n, items]: products of the tables' rows, and a bias.

    With FSDP each table is a unit of its own, in shards of rows: `parallel.wrap=[users,items]`. With DDP and
    `sparse=True` only the gradients of the batch's users are exchanged.
    """

    def __init__(self, users: int, items: int, width: int = 32, sparse: bool = False) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width, sparse=sparse)
        self.items = nn.Linear(width, items)
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)
        nn.init.zeros_(self.items.bias)

    def forward(self, user: Tensor) -> Tensor:
        scores: Tensor = self.items(self.users(user))
        return scores
