"""Models that come with Everstep, for `model._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.models.convnet import ConvNet
    from everstep.trainer.models.gpt import GPT
    from everstep.trainer.models.image_text import ImageText
    from everstep.trainer.models.mlp import MLP
    from everstep.trainer.models.vit import VisionTransformer
    from everstep.trainer.tasks.documents import TextEncoder
    from everstep.trainer.tasks.forecasting import WindowNetwork
    from everstep.trainer.tasks.recommendation import MatrixFactorization

__all__ = [
    "GPT",
    "MLP",
    "ConvNet",
    "ImageText",
    "MatrixFactorization",
    "TextEncoder",
    "VisionTransformer",
    "WindowNetwork",
]
__getattr__ = lazy(
    __name__,
    {
        "ConvNet": "everstep.trainer.models.convnet",
        "GPT": "everstep.trainer.models.gpt",
        "ImageText": "everstep.trainer.models.image_text",
        "MLP": "everstep.trainer.models.mlp",
        "MatrixFactorization": "everstep.trainer.tasks.recommendation",
        "TextEncoder": "everstep.trainer.tasks.documents",
        "WindowNetwork": "everstep.trainer.tasks.forecasting",
        "VisionTransformer": "everstep.trainer.models.vit",
    },
)


def __dir__() -> list[str]:
    return __all__
