"""Residual network with BatchNorm for digits, measured by objects of torchmetrics."""

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

from everstep import Batch, Loss


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to the input; with a stride both halve the picture."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.around = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        changed = self.norm_2(self.second(F.relu(self.norm_1(self.first(x)))))
        return F.relu(changed + self.around(x))


class DigitTask:
    """Batches hold `image` [n, 1, 8, 8] and `label` [n]."""

    unit = "images"

    def __init__(self, width: int = 16, smoothing: float = 0.1) -> None:
        self.width, self.smoothing = width, smoothing
        self.f1, self.confusion = MulticlassF1Score(10), MulticlassConfusionMatrix(10)

    def model(self) -> nn.Module:
        width = self.width
        stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks = [Residual(width, width), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)]
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return self._loss(model(batch["image"]), batch["label"], self.smoothing)

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        logits, label = model(batch["image"]), batch["label"]
        # Everstep computes them over all samples and processes, and resets them.
        self.f1.update(logits, label)
        self.confusion.update(logits, label)
        loss = self._loss(logits, label, 0.0)
        return Loss(loss.sum, loss.count, {"f1": self.f1, "confusion": self.confusion})

    def _loss(self, logits: Tensor, label: Tensor, smoothing: float) -> Loss:
        return Loss(F.cross_entropy(logits, label, label_smoothing=smoothing, reduction="sum"), len(label))
