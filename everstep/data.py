"""Datasets, transforms and collates that come with Everstep, for `data._target_` and the nodes in it.

Functions that prepare a dataset are in `everstep` itself: they call what they are given, so no config may name them.
"""

from typing import TYPE_CHECKING

from everstep.lazy_names import lazy

if TYPE_CHECKING:
    from everstep.trainer.data.arrow_reader import ArrowDataset
    from everstep.trainer.data.co2_series import co2_windows
    from everstep.trainer.data.collate import Bucket, Pack, Pad
    from everstep.trainer.data.dataset import ArrayDataset, Splits, Subset
    from everstep.trainer.data.decode import Each, Images
    from everstep.trainer.data.glyphs import glyphs
    from everstep.trainer.data.map_style import MapDataset
    from everstep.trainer.data.ordering.mixture import Mixture
    from everstep.trainer.data.ordering.weighted import Weighted, balanced
    from everstep.trainer.data.prepared import dataset as prepared
    from everstep.trainer.data.prepared import mixture
    from everstep.trainer.data.sklearn_datasets import breast_cancer, digits, split_ids
    from everstep.trainer.data.stdlib_calls import stdlib_calls
    from everstep.trainer.data.stdlib_corpus import stdlib_corpus
    from everstep.trainer.data.stdlib_documents import stdlib_documents
    from everstep.trainer.data.stdlib_subwords import stdlib_subwords

__all__ = [
    "ArrayDataset",
    "ArrowDataset",
    "Bucket",
    "Each",
    "Images",
    "MapDataset",
    "Mixture",
    "Pack",
    "Pad",
    "Splits",
    "Subset",
    "Weighted",
    "balanced",
    "breast_cancer",
    "co2_windows",
    "digits",
    "glyphs",
    "mixture",
    "prepared",
    "split_ids",
    "stdlib_calls",
    "stdlib_corpus",
    "stdlib_documents",
    "stdlib_subwords",
]

_HOMES = {
    "arrow_reader": "ArrowDataset",
    "co2_series": "co2_windows",
    "collate": "Bucket Pack Pad",
    "dataset": "ArrayDataset Splits Subset",
    "decode": "Each Images",
    "glyphs": "glyphs",
    "map_style": "MapDataset",
    "ordering.mixture": "Mixture",
    "prepared": "mixture",
    "sklearn_datasets": "breast_cancer digits split_ids",
    "stdlib_calls": "stdlib_calls",
    "stdlib_corpus": "stdlib_corpus",
    "stdlib_documents": "stdlib_documents",
    "stdlib_subwords": "stdlib_subwords",
    "ordering.weighted": "Weighted balanced",
}
__getattr__ = lazy(
    __name__,
    {name: f"everstep.trainer.data.{module}" for module, names in _HOMES.items() for name in names.split()}
    | {"prepared": "everstep.trainer.data.prepared:dataset"},
)


def __dir__() -> list[str]:
    return __all__
