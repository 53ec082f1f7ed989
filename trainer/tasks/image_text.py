"""Contrastive learning of images and their texts, as CLIP does it, over the whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.errors import ConfigError
from everstep.trainer.task import Batch, Loss


class ImageTextContrast:
    """Batches hold `image` [n, …], `words` int64 [n, t] and `name` int64 [n], equal for equal texts.

    The model returns {"image": [n, dim], "text": [n, dim]}, whose products are the logits. The loss of a step is of all
    pairs of the global batch; that of an evaluation is of the pairs of a microbatch, while `retrieval` is of the whole
    set: each image looks for its name among all names of the set.
    """

    unit = "pairs"

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        try:
            from everstep.trainer.tasks.retrieval import RetrievalRecall
        except ImportError as error:
            raise ConfigError(f"this task needs {error.name}: pip install 'everstep[glyphs]'") from error
        self._build = model
        self.retrieval = RetrievalRecall()

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def features(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the vectors of a microbatch."""
        found: Mapping[str, Tensor] = model(batch["image"], batch["words"])
        return found

    def batch_loss(self, features: Mapping[str, Tensor]) -> Loss:
        """Return the mean of the cross entropies from images to texts and back, summed over the pairs.

        Pairs of one text share its probability: the sum is the same as with all of them as right answers.
        """
        logits = features["image"] @ features["text"].T
        own = torch.arange(len(logits), device=logits.device)
        there = F.cross_entropy(logits, own, reduction="sum")
        back = F.cross_entropy(logits.T, own, reduction="sum")
        return Loss((there + back) / 2, len(logits))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of the pairs of a microbatch, for checks."""
        return self.batch_loss(self.features(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of a microbatch, and `retrieval` of the whole set."""
        features = self.features(model, batch)
        loss = self.batch_loss(features)
        self.retrieval.update(features["image"], features["text"], batch["name"])
        return Loss(loss.sum, loss.count, {"retrieval": self.retrieval})

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the vectors `image` and `text` [n, dim], of length 1."""
        found = model(batch["image"], batch["words"])
        return {name: F.normalize(found[name], dim=1) for name in ("image", "text")}
