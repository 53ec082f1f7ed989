"""Datasets as people bring them: a resume on the same world gives the same bits, whatever generators they draw from."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.resume_checks import IDS, PLACES, assert_resumes, zoo

pytestmark = pytest.mark.dist
DRAWN = [
    *((f"data._target_=support.random_datasets.{name}", f"+data.kind={kind}")
      for name, kind in (("drawing", "torch"), ("drawing", "numpy"), ("drawing", "python"), ("drawing", "own"))),
    ("data._target_=support.random_datasets.ragged",),
    ("data._target_=support.random_datasets.drawn_evenly", "evaluate.every=null"),
]  # fmt: skip
NAMES = ["torch", "numpy", "python", "generators of its own", "ragged", "by weight"]


def of(*given: str) -> tuple[str, ...]:
    return ("plugins=[zoo,support.random_datasets]", "++evaluate.metric=loss", *given)


@pytest.mark.parametrize("given", DRAWN, ids=NAMES)
@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_a_resume_gives_the_same_bits(tmp_path: Path, world: int, kind: str, given: tuple[str, ...]) -> None:
    assert_resumes(world, tmp_path, kind, *of(*given))


@pytest.mark.parametrize(("world", "kind"), PLACES, ids=IDS)
def test_an_iterable_dataset_is_refused_in_a_line(tmp_path: Path, world: int, kind: str) -> None:
    ended = zoo(world, tmp_path, kind, *of("data._target_=support.random_datasets.stream"))
    assert ended.codes == [2] * world, ended.printed
    assert "can only be iterated" in ended.printed
    assert "Traceback" not in ended.printed
