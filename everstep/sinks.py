"""Trackers that come with Everstep, for `log.sinks`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.reporting.trackers.mlflow_sink import MLflow
    from everstep.trainer.reporting.trackers.trackio_sink import Trackio

__all__ = ["MLflow", "Trackio"]
__getattr__ = lazy(
    __name__,
    {
        "MLflow": "everstep.trainer.reporting.trackers.mlflow_sink",
        "Trackio": "everstep.trainer.reporting.trackers.trackio_sink",
    },
)


def __dir__() -> list[str]:
    return __all__
