"""Hooks see what they ask for, whole and with the right figures on any world; one that fails says its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from everstep.trainer.reporting.media import read_media
from everstep.trainer.reporting.sinks import read_metrics
from support.ranks import folder, train

pytestmark = pytest.mark.dist
PLUGINS = "plugins=[support.toy,support.seeing_hooks]"
HOOK = "support.seeing_hooks"


def seen(root: Path, name: str, rank: int = 0) -> list[Any]:
    return [json.loads(line) for line in (root / f"{name}-{rank}.jsonl").read_text().splitlines()]


def test_gradient_norms_by_name_are_those_of_whole_tensors_on_any_world(tmp_path: Path) -> None:
    worlds = [(1, "single"), (2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")]
    for world, kind in worlds:
        hook = f"hooks=[{{_target_: {HOOK}.Sees, file: {kind}{world}}}]"
        ended = train(world, tmp_path, PLUGINS, hook, f"parallel={kind}", run=f"{kind}{world}")
        assert ended.codes == [0] * world, ended.printed
    first = seen(tmp_path, "single1")
    assert [record["step"] for record in first] == [3, 6, 9, 12]
    for world, kind in worlds:
        for rank in range(world):
            for record, whole in zip(seen(tmp_path, f"{kind}{world}", rank), first, strict=True):
                assert record["gradients"] == pytest.approx(whole["gradients"], rel=1e-9)
                together = math.sqrt(sum(norm**2 for norm in record["gradients"].values()))
                assert together == pytest.approx(record["norm"], rel=1e-9)
                assert list(record["gradients"]) == record["names"] == whole["names"]
                assert record["outputs"] == [record["rows"]]
                assert not record["needs_graph"]


def test_a_hook_that_asks_for_nothing_gets_numbers_at_each_step(tmp_path: Path) -> None:
    assert train(1, tmp_path, PLUGINS, f"hooks=[{{_target_: {HOOK}.SeesNumbers, file: numbers}}]").codes == [0]
    assert seen(tmp_path, "numbers") == [[step, True, {}] for step in range(1, 13)]


def test_looking_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    assert train(2, tmp_path, run="plain").codes == [0, 0]
    hook = f"hooks=[{{_target_: {HOOK}.Sees, file: looked}}]"
    assert train(2, tmp_path, PLUGINS, hook, run="looked").codes == [0, 0]
    plain, looked = (read_metrics(folder(tmp_path, run)) for run in ("plain", "looked"))
    assert {s: (r["loss"], r["norm"]) for s, r in plain.items()} == {
        s: (r["loss"], r["norm"]) for s, r in looked.items()
    }


def test_what_a_hook_logs_is_recorded_once_by_rank_0(tmp_path: Path) -> None:
    hook = f"hooks=[{{_target_: {HOOK}.logs, _partial_: true}}]"
    ended = train(2, tmp_path, PLUGINS, hook)
    assert ended.codes == [0, 0], ended.printed
    found = read_media(folder(tmp_path))
    names = [(record["step"], record["name"]) for record in found]
    assert sorted(names) == sorted((s, n) for s in range(1, 13) for n in ("note", "picture", "spread"))
    assert all((tmp_path / "toy" / record["path"]).exists() for record in found if "path" in record)


def test_a_picture_of_floats_ends_the_run_with_one_line(tmp_path: Path) -> None:
    ended = train(1, tmp_path, PLUGINS, f"hooks=[{{_target_: {HOOK}.logs_floats, _partial_: true}}]")
    assert ended.codes == [2]
    assert "error: log_image('picture'): the picture is float32, it must be uint8" in ended.printed
    assert "Traceback" not in ended.printed


def test_a_hook_that_fails_ends_the_run_under_its_name(tmp_path: Path) -> None:
    ended = train(
        1, tmp_path, PLUGINS, f"hooks=[{{_target_: {HOOK}.SeesNumbers, file: n}}, {{_target_: {HOOK}.Fails, step: 5}}]"
    )
    assert ended.codes == [1], ended.printed
    assert f"hooks[1] ({HOOK}.Fails) failed at step 5: ValueError: the hook is broken" in ended.printed
    assert "seeing_hooks.py:" in ended.printed
    assert "Traceback" not in ended.printed


@pytest.mark.parametrize("rank", ["null", "1"])
def test_a_hook_that_fails_may_be_switched_off_and_training_goes_on(tmp_path: Path, rank: str) -> None:
    hook = f"hooks=[{{_target_: {HOOK}.Fails, step: 5, rank: {rank}}}]"
    ended = train(2, tmp_path, PLUGINS, hook, "hooks_on_error=disable")
    assert ended.codes == [0, 0], ended.printed
    said = f"hooks[0] ({HOOK}.Fails) failed at step 5 on rank 1 and is off until the next start"
    assert ended.printed.count(said) == 1
    assert list(read_metrics(folder(tmp_path))) == list(range(1, 13))


def test_a_hooks_own_config_error_is_shown_as_it_is(tmp_path: Path) -> None:
    ended = train(1, tmp_path, PLUGINS, f"hooks=[{{_target_: {HOOK}.refuses, _partial_: true}}]")
    assert ended.codes == [2], ended.printed
    assert "error: hook.key=3: cannot be; set 2" in ended.printed
