"""Prepared datasets as the `data` of a run: one, or a mixture of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from everstep.dataset.index import folders
from everstep.errors import ConfigError
from everstep.trainer.data.arrow_reader import ArrowDataset
from everstep.trainer.data.cache import ShardCache
from everstep.trainer.data.dataset import Augment, Collate, Dataset, Decode, Splits
from everstep.trainer.data.ordering.interleave import shares
from everstep.trainer.data.ordering.mixture import Mixture


def dataset(
    path: str,
    *,
    columns: Sequence[str] | None = None,
    cast: Mapping[str, str] | None = None,
    verify: bool = False,
    decode: Decode | None = None,
    collate: Collate | None = None,
    augment: Augment | None = None,
    cache: Callable[[], ShardCache] | None = None,
) -> Splits:
    """Return a dataset of `everstep data prepare`: `path`/train and `path`/validation, or `path` itself.

    Args:
        path: a folder or any fsspec URL.
        columns: names of the columns to read; None reads all.
        cast: a torch type by column, such as {"tokens": "int64"}.
        verify: check the digests of local shards when they are opened; remote shards are always checked.
        decode, collate, augment: applied to the batches, in this order; the last to training data only.
    """
    opened = [ArrowDataset(url, columns=columns, cast=cast, verify=verify, cache=cache) for url in folders(path)]
    return Splits(opened[0], opened[1] if len(opened) > 1 else None, augment, decode, collate)


def mixture(
    mix: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    cast: Mapping[str, str] | None = None,
    verify: bool = False,
    decode: Decode | None = None,
    collate: Collate | None = None,
    augment: Augment | None = None,
    cache: Callable[[], ShardCache] | None = None,
) -> Splits:
    """Return several prepared datasets, each `{path: …, weight: …}`, with the arguments of `dataset`.

    At every point of the run each has had its share of the samples, to less than one sample; small datasets repeat. The
    held-out set is the validation sets of all that have one, each sample once.
    """
    if not mix:
        raise ConfigError("data.mix=[]: name at least one dataset as {path: …, weight: …}")
    weights = []
    train: list[Dataset] = []
    held_out: list[Dataset] = []
    for number, entry in enumerate(mix):
        if set(entry) != {"path", "weight"}:
            raise ConfigError(f"data.mix[{number}] has the keys {', '.join(map(str, entry))}; give path and weight")
        splits = dataset(str(entry["path"]), columns=columns, cast=cast, verify=verify, cache=cache)
        weights.append(entry["weight"])
        train.append(splits.train)
        held_out += splits.held_out().values()
    validation = Mixture(held_out, shares([1] * len(held_out))) if held_out else None
    return Splits(Mixture(train, shares(weights)), validation, augment, decode, collate)
