"""Tasks that measure with torchmetrics, and what scikit-learn says of the same predictions."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryF1Score, MulticlassConfusionMatrix
from torchmetrics.regression import PearsonCorrCoef
from torchmetrics.retrieval import RetrievalRecall
from torchmetrics.utilities.data import dim_zero_mean

from everstep import ArrayDataset, Batch, Loss, Splits

CLASSES = 3


def columns(samples: int, seed: int) -> dict[str, NDArray[np.generic]]:
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(samples, 4)).astype(np.float32)
    hits = (x.sum(axis=1) + draws.normal(size=samples) > 0).astype(np.int64)
    return {"x": x, "hit": hits, "kind": draws.integers(0, CLASSES, samples), "query": np.arange(samples) // 5}


def measured_data(samples: int = 40, held_out: int = 43) -> Splits:
    """Held-out samples that no number of processes divides."""
    return Splits(ArrayDataset(columns(samples, 0)), ArrayDataset(columns(held_out, 1)))


def two_sets() -> Splits:
    return Splits(ArrayDataset(columns(40, 0)), {"a": ArrayDataset(columns(19, 1)), "b": ArrayDataset(columns(24, 2))})


class MeasuredTask:
    """Two small heads; its metrics have states of all kinds: sums, lists, stacked tensors."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = self._metrics()
        self.train_f1 = BinaryF1Score()

    def _metrics(self) -> dict[str, Metric]:
        return {
            "f1": BinaryF1Score(),
            "auroc": BinaryAUROC(),
            "recall": RetrievalRecall(top_k=2),
            "confusion": MulticlassConfusionMatrix(CLASSES),
            "pearson": PearsonCorrCoef(),
        }

    def model(self) -> nn.Module:
        return nn.Linear(4, 1 + CLASSES)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        self.train_f1.update(out[:, 0].sigmoid(), batch["hit"])
        return Loss(_loss(out, batch), len(out), {"f1": self.train_f1, "out": out.detach().sum()})

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        score, hit = out[:, 0].sigmoid(), batch["hit"]
        self.metrics["f1"].update(score, hit)
        self.metrics["auroc"].update(score, hit)
        self.metrics["recall"].update(score, hit, indexes=batch["query"])
        self.metrics["confusion"].update(out[:, 1:].argmax(dim=1), batch["kind"])
        self.metrics["pearson"].update(out[:, 0], batch["x"][:, 0])
        return Loss(_loss(out, batch), len(out), {**self.metrics, "hits": hit.sum()})

    def preview(self, model: nn.Module) -> str:
        """Keep the trained model's outputs on the held-out samples, for the test."""
        x = torch.from_numpy(columns(43, 1)["x"])
        with torch.no_grad():
            out = model(x.to(next(model.parameters()).dtype)).numpy()
        if os.environ.get("RANK", "0") == "0":
            np.save("outputs.npy", out)
        return ""


def _loss(out: Tensor, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(out[:, 0], batch["hit"].to(out.dtype), reduction="sum")


class ModuleTask(nn.Module, MeasuredTask):
    """A task that is a module, so that its metric objects are modules of it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.metrics = nn.ModuleDict(self._metrics())  # type: ignore[assignment]
        self.train_f1 = BinaryF1Score()


class ForgottenUpdate(MeasuredTask):
    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        return Loss(_loss(out, batch), len(out), {"f1": self.metrics["f1"]})


class ManyCells(MeasuredTask):
    def _metrics(self) -> dict[str, Metric]:
        return {**super()._metrics(), "confusion": MulticlassConfusionMatrix(11)}


class ReturnsAList(MeasuredTask):
    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        return Loss(_loss(out, batch), len(out), {"outputs": out.tolist()})


class ReturnsACollection(MeasuredTask):
    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        out = model(batch["x"])
        both = MetricCollection([BinaryF1Score(), BinaryAUROC()])
        both.update(out[:, 0].sigmoid(), batch["hit"])
        return Loss(_loss(out, batch), len(out), {"both": both})


class KeepsAMean(MeasuredTask):
    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        metric = MeanMetric()
        metric._reductions["mean_value"] = dim_zero_mean
        metric.update(batch["x"])
        out = model(batch["x"])
        return Loss(_loss(out, batch), len(out), {"mean": metric})


def expected(out: NDArray[np.float32], held_out: dict[str, NDArray[np.generic]]) -> dict[str, float]:
    """The figures that scikit-learn and numpy give for a model's outputs."""
    from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

    score, hit = out[:, 0], held_out["hit"]
    confusion = confusion_matrix(held_out["kind"], out[:, 1:].argmax(axis=1), labels=range(CLASSES))
    recalls = []
    for query in np.unique(held_out["query"]):
        rows = held_out["query"] == query
        best = np.argsort(-score[rows], kind="stable")[:2]
        total = hit[rows].sum()
        recalls.append(hit[rows][best].sum() / total if total else 0.0)
    cells = {f"confusion/{i}/{j}": float(confusion[i, j]) for i in range(CLASSES) for j in range(CLASSES)}
    return {
        "f1": f1_score(hit, score > 0),
        "auroc": roc_auc_score(hit, score),
        "recall": float(np.mean(recalls)),
        "pearson": float(np.corrcoef(score, held_out["x"][:, 0])[0, 1]),
        **cells,
    }
