"""Which of three wines is it? The task and the data that conf/experiment/quickstart.yaml names."""

from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from everstep import ArrayDataset, Batch, Loss, Splits
from everstep.data import split_ids


class WineTask:
    """Everstep asks for three things: a model, a training loss and an evaluation."""

    def __init__(self, width: int = 32) -> None:
        self.width = width

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(13, self.width), nn.GELU(), nn.Linear(self.width, 3))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return self._loss(model(batch["measures"]), batch["wine"])

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        guess = model(batch["measures"])
        right = (guess.argmax(dim=1) == batch["wine"]).sum().float()
        loss = self._loss(guess, batch["wine"])
        return Loss(loss.sum, loss.count, {"accuracy": right})

    def _loss(self, guess: Tensor, wine: Tensor) -> Loss:
        # A sum over the samples and how many there were: Everstep takes the mean over the whole batch.
        return Loss(F.cross_entropy(guess, wine, reduction="sum"), len(wine))


def wines(held_out: float = 0.25) -> Splits:
    """178 wines, a quarter of them held out; measures standardised by those that are trained on."""
    measures, wine = load_wine(return_X_y=True)
    train, validation = split_ids(len(wine), held_out, seed=0)
    measures = (measures - measures[train].mean(axis=0)) / measures[train].std(axis=0)
    columns = {"measures": measures.astype("float32"), "wine": wine}
    parts = [ArrayDataset({name: column[ids] for name, column in columns.items()}) for ids in (train, validation)]
    return Splits(train=parts[0], validation=parts[1])
