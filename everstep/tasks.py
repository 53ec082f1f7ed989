"""Tasks that come with Everstep, for `task._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.tasks.classification import ImageClassifier, TabularClassifier
    from everstep.trainer.tasks.language import LanguageModel

__all__ = ["ImageClassifier", "LanguageModel", "TabularClassifier"]
__getattr__ = lazy(
    __name__,
    {
        "ImageClassifier": "everstep.trainer.tasks.classification",
        "LanguageModel": "everstep.trainer.tasks.language",
        "TabularClassifier": "everstep.trainer.tasks.classification",
    },
)


def __dir__() -> list[str]:
    return __all__
