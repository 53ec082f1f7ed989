"""Tasks that come with Everstep, for `task._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.tasks.classification import ImageClassifier, TabularClassifier
    from everstep.trainer.tasks.image_text import ImageTextContrast
    from everstep.trainer.tasks.language import LanguageModel
    from everstep.trainer.tasks.subword_language import SubwordLanguageModel
    from everstep.trainer.tasks.supervised import Supervised

__all__ = [
    "ImageClassifier",
    "ImageTextContrast",
    "LanguageModel",
    "SubwordLanguageModel",
    "Supervised",
    "TabularClassifier",
]
__getattr__ = lazy(
    __name__,
    {
        "ImageClassifier": "everstep.trainer.tasks.classification",
        "ImageTextContrast": "everstep.trainer.tasks.image_text",
        "LanguageModel": "everstep.trainer.tasks.language",
        "SubwordLanguageModel": "everstep.trainer.tasks.subword_language",
        "Supervised": "everstep.trainer.tasks.supervised",
        "TabularClassifier": "everstep.trainer.tasks.classification",
    },
)


def __dir__() -> list[str]:
    return __all__
