"""Pairs of user and item without a download: classes of the standard library and what they call."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from everstep.errors import ConfigError
from everstep.trainer.data.dataset import ArrayDataset, Splits
from everstep.trainer.data.stdlib_corpus import stdlib_sources

CLASS = re.compile(r"^class \w+[^\n]*\n(?:[ \t]+[^\n]*\n|\n)*", re.MULTILINE)
CALL = re.compile(r"(?<!def )(?<!class )\b([A-Za-z_]\w*)\(")
FEWEST_ITEMS = 5
"""Items of a user, at least."""


def stdlib_calls(users: int = 768, items: int = 512) -> Splits:
    """Return classes as users and the names that they call as items, with each user's last item held out.

    Only the classes with the most names and the most common names are used. Batches have `user` and `item`, int64 [n];
    those that are held out also have `seen`, int64 [n, most], the user's other items (the last one is repeated), and
    `popularity_rank`, int64 [n]: the number of more popular items that the user has not seen.

    Args:
        users: number of users.
        items: size of the catalogue.
    """
    calls = [_calls(text) for text in _classes()]
    common = [name for name, _ in Counter(chain.from_iterable(calls)).most_common(items)]
    numbers = {name: number for number, name in enumerate(common)}
    known = [[numbers[name] for name in names if name in numbers] for names in calls]
    chosen = sorted((names for names in known if len(names) >= FEWEST_ITEMS), key=len, reverse=True)[:users]
    for key, wanted, found in (("users", users, len(chosen)), ("items", items, len(common))):
        if not 1 <= wanted <= found:
            raise ConfigError(f"data.{key}={wanted} must be 1 to {found}, as many as this Python's library has")
    user, item = np.array([(n, name) for n, names in enumerate(chosen) for name in names[:-1]]).T
    return Splits(ArrayDataset({"user": user, "item": item}), _held_out(chosen, np.bincount(item, minlength=items)))


def _held_out(chosen: list[list[int]], popularity: NDArray[np.int64]) -> ArrayDataset:
    """Return the last item of each user; `popularity` [items] counts the training pairs."""
    most = max(map(len, chosen)) - 1
    item = np.array([names[-1] for names in chosen])
    seen = np.array([names[:-1] + names[-2:-1] * (most + 1 - len(names)) for names in chosen])
    unseen = np.ones((len(chosen), len(popularity)), bool)
    np.put_along_axis(unseen, seen, False, axis=1)
    rank = (unseen & (popularity > popularity[item][:, None])).sum(axis=1)
    return ArrayDataset({"user": np.arange(len(chosen)), "item": item, "seen": seen, "popularity_rank": rank})


def _classes() -> list[str]:
    """Return the text of each class that is defined at the top of a file."""
    texts = (content.decode("utf-8", "replace") for _, content in stdlib_sources())
    return [found.group() for text in texts for found in CLASS.finditer(text)]


def _calls(text: str) -> list[str]:
    """Return the names that a text calls, each once, in the order of the first calls."""
    return list(dict.fromkeys(CALL.findall(text)))
