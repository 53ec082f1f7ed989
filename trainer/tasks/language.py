"""Language modelling over bytes: predict each byte from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everstep.trainer.task import Batch, Loss

ModelFactory = Callable[[], nn.Module]

IGNORED = -100
"""A target that no token has: cross entropy leaves it out."""
PROMPT = "def read(path: str) -> str:\n    "


class LanguageModel:
    """Batches hold `tokens`: integers [n, block + 1]; the last one is only a target.

    With documents in one row (`segments` [n, block + 1], 0 is padding, from `everstep.data.Pack` or `Segments`) or
    padded rows (`lengths` [n], from `Pad` or `Bucket`), only tokens that follow one of their own document count.
    """

    unit = "tokens"

    def __init__(
        self,
        model: ModelFactory,
        preview_bytes: int = 400,
        preview_temperature: float = 0.7,
        preview_prompt: str = PROMPT,
    ) -> None:
        self._build = model
        self.preview_bytes = preview_bytes
        self.preview_temperature = preview_temperature
        """0 takes the most likely byte each time."""
        self.preview_prompt = preview_prompt

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy in nats, summed over all predicted tokens that count."""
        tokens = batch["tokens"].long()
        logits = model(tokens[:, :-1])
        targets = tokens[:, 1:]
        counted = counted_targets(batch, targets.shape[1])
        if counted is not None:
            targets = targets.masked_fill(~counted, IGNORED)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return Loss(total, targets.numel() if counted is None else counted.sum())

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `bits_per_byte`; 8 is the value of a uniform guess."""
        loss = self.loss(model, batch)
        return Loss(loss.sum, loss.count, {"bits_per_byte": loss.sum / math.log(2)})

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` in nats per predicted token [n], and `tokens`, the number of them that count [n]."""
        tokens = batch["tokens"].long()
        targets = tokens[:, 1:]
        logits = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        counted = counted_targets(batch, targets.shape[1])
        weight = torch.ones_like(losses) if counted is None else counted.to(losses.dtype)
        count = weight.sum(dim=1)
        return {"loss": (losses * weight).sum(dim=1) / count, "tokens": count.long()}

    def preview(self, model: nn.Module) -> str:
        """Return a text that the model generates after a fixed prompt, the same for the same weights.

        Every rank runs the same number of forward passes, so it works on a sharded model.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self._write(model)
        finally:
            model.train(training)

    def _write(self, model: nn.Module) -> str:
        generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        context = int(getattr(getattr(model, "module", model), "context", 64))
        text = list(self.preview_prompt.encode())
        for _ in range(self.preview_bytes):
            window = torch.tensor([text[-context:]], device=device)
            text.append(self._draw(model(window)[0, -1].float().cpu(), generator))
        return bytes(text).decode("utf-8", errors="replace")

    def _draw(self, logits: Tensor, generator: torch.Generator) -> int:
        if self.preview_temperature <= 0:
            return int(logits[:256].argmax())
        weights = torch.softmax(logits[:256] / self.preview_temperature, dim=0)
        # A diverged model has no distribution; the preview must not end the run for that.
        weights = torch.nan_to_num(weights).clamp(min=1e-12)
        return int(torch.multinomial(weights, 1, generator=generator))


def counted_targets(batch: Batch, targets: int) -> Tensor | None:
    """Return a mask of the targets [n, targets] that count; None if all do."""
    segments, lengths = batch.get("segments"), batch.get("lengths")
    if segments is not None:
        # The first token of a document has no token of its own document before it to be predicted from.
        return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    if lengths is not None:
        return torch.arange(1, targets + 1, device=lengths.device) < lengths[:, None]
    return None
