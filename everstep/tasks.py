"""Tasks that come with Everstep, for `task._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.tasks.classification import ImageClassifier, TabularClassifier
    from everstep.trainer.tasks.documents import DocumentClassifier
    from everstep.trainer.tasks.forecasting import QuantileForecast
    from everstep.trainer.tasks.image_text import ImageTextContrast
    from everstep.trainer.tasks.language import LanguageModel
    from everstep.trainer.tasks.recommendation import Recommendation
    from everstep.trainer.tasks.subword_language import SubwordLanguageModel
    from everstep.trainer.tasks.supervised import Supervised

__all__ = [
    "DocumentClassifier",
    "ImageClassifier",
    "ImageTextContrast",
    "LanguageModel",
    "QuantileForecast",
    "Recommendation",
    "SubwordLanguageModel",
    "Supervised",
    "TabularClassifier",
]
__getattr__ = lazy(
    __name__,
    {
        "DocumentClassifier": "everstep.trainer.tasks.documents",
        "ImageClassifier": "everstep.trainer.tasks.classification",
        "ImageTextContrast": "everstep.trainer.tasks.image_text",
        "LanguageModel": "everstep.trainer.tasks.language",
        "QuantileForecast": "everstep.trainer.tasks.forecasting",
        "Recommendation": "everstep.trainer.tasks.recommendation",
        "SubwordLanguageModel": "everstep.trainer.tasks.subword_language",
        "Supervised": "everstep.trainer.tasks.supervised",
        "TabularClassifier": "everstep.trainer.tasks.classification",
    },
)


def __dir__() -> list[str]:
    return __all__
