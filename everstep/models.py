"""Models that come with Everstep, for `model._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.models.convnet import ConvNet
    from everstep.trainer.models.gpt import GPT
    from everstep.trainer.models.mlp import MLP

__all__ = ["GPT", "MLP", "ConvNet"]
__getattr__ = lazy(
    __name__,
    {
        "ConvNet": "everstep.trainer.models.convnet",
        "GPT": "everstep.trainer.models.gpt",
        "MLP": "everstep.trainer.models.mlp",
    },
)


def __dir__() -> list[str]:
    return __all__
