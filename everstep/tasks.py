"""Tasks that come with Everstep, for `task._target_`."""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.tasks.images import ImageClassifier
    from everstep.trainer.tasks.language import LanguageModel
    from everstep.trainer.tasks.tabular import TabularClassifier

__all__ = ["ImageClassifier", "LanguageModel", "TabularClassifier"]
__getattr__ = lazy(
    __name__,
    {
        "ImageClassifier": "everstep.trainer.tasks.images",
        "LanguageModel": "everstep.trainer.tasks.language",
        "TabularClassifier": "everstep.trainer.tasks.tabular",
    },
)


def __dir__() -> list[str]:
    return __all__
