"""Forecasting of a series by quantiles: pinball loss, and the error relative to a trivial forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.task import Batch, Loss


class QuantileForecast:
    """Batches hold `past` [n, past], `future` [n, horizon] and `scale` [n], the unit of errors.

    Args:
        model: makes a network of `past` -> [n, horizon, quantiles].
        quantiles: chances that a value is below the forecast, in ascending order; the middle one is the forecast.
        season: steps of a season; the trivial forecast repeats the last one.
    """

    unit = "windows"

    def __init__(
        self, model: Callable[[], nn.Module], quantiles: Sequence[float] = (0.1, 0.5, 0.9), season: int = 52
    ) -> None:
        self._build = model
        self.quantiles, self.season = list(quantiles), season
        inside = [chance for chance in self.quantiles if 0 < chance < 1]
        if not inside or self.quantiles != sorted({*inside}):
            raise ConfigError(f"task.quantiles={self.quantiles} must be between 0 and 1, in ascending order")
        if season < 1:
            raise ConfigError(f"task.season={season} must be at least 1 step")

    def model(self) -> nn.Module:
        """Return the network of the config's `model` node."""
        return self._build()

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the pinball loss in units of `scale`: means over steps and quantiles, summed over windows."""
        return Loss(self._pinball(self._forecast(model, batch), batch), len(batch["past"]))

    def evaluate(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss with `mase`, that of the trivial forecast, and `coverage`.

        `mase` is the mean absolute error of the middle quantile in units of `scale`; `coverage` is the share of values
        between the lowest and the highest quantile.
        """
        forecast, future = self._forecast(model, batch), batch["future"]
        inside = (future >= forecast[:, :, 0]) & (future <= forecast[:, :, -1])
        metrics = {
            "mase": _error(forecast[:, :, len(self.quantiles) // 2], batch),
            "baseline_mase": _error(self._last_season(batch), batch),
            "coverage": inside.to(forecast.dtype).mean(dim=1).sum(),
        }
        return Loss(self._pinball(forecast, batch), len(future), metrics)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return `forecast` [n, horizon], and `low` and `high`, the outermost quantiles."""
        found = self._forecast(model, batch)
        return {"forecast": found[:, :, len(self.quantiles) // 2], "low": found[:, :, 0], "high": found[:, :, -1]}

    def _forecast(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["past"])
        wanted = (*batch["future"].shape, len(self.quantiles))
        if found.shape != wanted:
            raise ConfigError(
                f"the model forecasts {list(found.shape)} where future and task.quantiles need {list(wanted)}; "
                "change model.horizon or model.quantiles"
            )
        return found

    def _pinball(self, forecast: Tensor, batch: Batch) -> Tensor:
        chances = torch.tensor(self.quantiles, dtype=forecast.dtype, device=forecast.device)
        above = batch["future"][:, :, None] - forecast
        losses = torch.maximum(chances * above, (chances - 1) * above)
        return (losses.mean(dim=(1, 2)) / batch["scale"]).sum()

    def _last_season(self, batch: Batch) -> Tensor:
        """Return the last season of the past, repeated over the horizon: [n, horizon]."""
        horizon, past = batch["future"].shape[1], batch["past"]
        if past.shape[1] < self.season:
            raise ConfigError(f"task.season={self.season} is more than the {past.shape[1]} steps of past; lower it")
        steps = torch.arange(horizon, device=past.device) % self.season
        return past[:, past.shape[1] - self.season + steps]


def _error(forecast: Tensor, batch: Batch) -> Tensor:
    """Return the mean absolute error of each window in units of `scale`, summed over the windows."""
    return ((forecast - batch["future"]).abs().mean(dim=1) / batch["scale"]).sum()


class WindowNetwork(nn.Module):
    """Past values [n, past] -> quantiles of the next ones [n, horizon, quantiles].

    It sees differences from the last value in units of the window's own deviation, so it also works at levels that the
    series had in no training window. Its output is a linear map and a correction by a small network.
    """

    def __init__(self, past: int, horizon: int, quantiles: int = 3, width: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.shape = (horizon, quantiles)
        self.linear = nn.Linear(past, horizon * quantiles)
        self.correction = nn.Sequential(
            nn.Linear(past, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, horizon * quantiles)
        )

    def forward(self, past: Tensor) -> Tensor:
        last = past[:, -1:]
        deviation = past.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
        seen = (past - last) / deviation
        found = (self.linear(seen) + self.correction(seen)).unflatten(1, self.shape)
        out: Tensor = found * deviation[:, :, None] + last[:, :, None]
        return out
