"""Distributed PyTorch training that never loses a step: what a project of its own imports.

Tasks and models for configs are in `everstep.tasks` and `everstep.models`, datasets in `everstep.data`. Each name is
imported when it is first used, so `import everstep` needs no torch.
"""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.api.run import Run, TrainingError
    from everstep.api.train import train
    from everstep.dataset.prepare import prepare_arrays, prepare_blocks, prepare_frame, prepare_rows
    from everstep.errors import ConfigError, EverstepError
    from everstep.trainer.checkpoint.storage_reader import CheckpointReader
    from everstep.trainer.data.dataset import ArrayDataset, Dataset, Splits, Subset
    from everstep.trainer.data.map_style import MapDataset
    from everstep.trainer.data.ordering.order import uniform
    from everstep.trainer.data.ordering.weighted import Weighted, balanced
    from everstep.trainer.data.randomness import draws_nothing
    from everstep.trainer.reporting.media import log_histogram, log_image, log_table, log_text
    from everstep.trainer.step_info import StepInfo
    from everstep.trainer.step_view import every
    from everstep.trainer.task import AlternatingTask, Batch, Loss, Task
    from everstep.trainer.whole_batch_loss import WholeBatchTask

__version__ = "0.1.0"
__all__ = [
    "AlternatingTask",
    "ArrayDataset",
    "Batch",
    "CheckpointReader",
    "ConfigError",
    "Dataset",
    "EverstepError",
    "Loss",
    "MapDataset",
    "Run",
    "Splits",
    "StepInfo",
    "Subset",
    "Task",
    "TrainingError",
    "Weighted",
    "WholeBatchTask",
    "balanced",
    "draws_nothing",
    "every",
    "log_histogram",
    "log_image",
    "log_table",
    "log_text",
    "prepare_arrays",
    "prepare_blocks",
    "prepare_frame",
    "prepare_rows",
    "train",
    "uniform",
]

_HOMES = {
    "everstep.api.run": "Run TrainingError",
    "everstep.api.train": "train",
    "everstep.dataset.prepare": "prepare_arrays prepare_blocks prepare_frame prepare_rows",
    "everstep.errors": "ConfigError EverstepError",
    "everstep.trainer.checkpoint.storage_reader": "CheckpointReader",
    "everstep.trainer.data.dataset": "ArrayDataset Dataset Splits Subset",
    "everstep.trainer.data.map_style": "MapDataset",
    "everstep.trainer.data.ordering.order": "uniform",
    "everstep.trainer.data.randomness": "draws_nothing",
    "everstep.trainer.data.ordering.weighted": "Weighted balanced",
    "everstep.trainer.reporting.media": "log_histogram log_image log_table log_text",
    "everstep.trainer.step_info": "StepInfo",
    "everstep.trainer.step_view": "every",
    "everstep.trainer.task": "AlternatingTask Batch Loss Task",
    "everstep.trainer.whole_batch_loss": "WholeBatchTask",
}
__getattr__ = lazy(__name__, {name: module for module, names in _HOMES.items() for name in names.split()})


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
