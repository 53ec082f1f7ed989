"""Is this text prose or code? A frozen BERT with adapters in its attention, and a head that is trained."""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from everstep import Batch, Loss


def with_adapters(base: str, rank: int) -> nn.Module:
    """Return the BERT of a folder of `save_pretrained`, frozen, with adapters of LoRA and a head to train."""
    model = BertForSequenceClassification.from_pretrained(base)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules=["query", "value", "dense"]
    )
    return get_peft_model(model, config)


class ProseOrCode:
    """Batches hold `input_ids` [n, longest], padded, their `lengths` [n], and `label` [n]."""

    unit = "texts"

    def __init__(self, base: str, rank: int = 8) -> None:
        self.base, self.rank = base, rank

    def model(self) -> nn.Module:
        return with_adapters(self.base, self.rank)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return self._loss(self._logits(model, batch), batch["label"])

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        logits = self._logits(model, batch)
        loss = self._loss(logits, batch["label"])
        right = (logits.argmax(dim=1) == batch["label"]).sum().float()
        return Loss(loss.sum, loss.count, {"accuracy": right})

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        ids = batch["input_ids"].long()
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = places < batch["lengths"][:, None]  # data.collate (Pad) adds the lengths: the rest is padding
        return model(input_ids=ids, attention_mask=mask.long()).logits

    def _loss(self, logits: Tensor, label: Tensor) -> Loss:
        return Loss(F.cross_entropy(logits, label, reduction="sum"), len(label))
