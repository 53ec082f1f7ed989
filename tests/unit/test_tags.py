"""Tags of datasets: written with the data, carried along, and held against the policy of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from everstep.compose import Composed, compose
from everstep.dataset.index import ShardIndex
from everstep.dataset.prepare import prepare
from everstep.dataset.prepare.options import parse
from everstep.dataset.tags import parse_tags, policy_fault
from everstep.errors import ConfigError, DataError
from everstep.launch.config import JobConfig
from everstep.launch.preflight.checks import check
from everstep.trainer.command import verb
from support.shard_datasets import write_dataset

TAGS = "tags={license: CC0, source: 'https://example.org/a b', version: 1.0}"


def test_a_preparation_writes_its_tags_and_all_parts_of_a_dataset_have_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    words = [f"src={tmp_path / 'a.txt'}", f"dst={tmp_path / 'set'}"]
    prepare(parse([*words, TAGS]))
    index = ShardIndex.read(str(tmp_path / "set"))
    assert index.tags == {"license": "CC0", "source": "https://example.org/a b", "version": "1.0"}
    (tmp_path / "b.txt").write_text("three\n")
    with pytest.raises(DataError, match=r"append=true: .* has tags=\{'license': 'CC0'.*now tags=None"):
        prepare(parse([f"src={tmp_path / 'b.txt'}", words[1], "append=true"]))


def test_tags_that_are_set_later_change_neither_samples_nor_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "set", [3], {"id": np.arange(3)})
    before = ShardIndex.read(str(tmp_path / "set")).digest
    assert verb(["data", "tag", str(tmp_path / "set"), "license=CC0", "sensitivity=personal"]) == 0
    assert "license:CC0, sensitivity:personal" in capsys.readouterr().out
    assert verb(["data", "tag", str(tmp_path / "set"), "sensitivity="]) == 0
    index = ShardIndex.read(str(tmp_path / "set"))
    assert (index.tags, index.digest) == ({"license": "CC0"}, before)
    assert verb(["data", "tag", str(tmp_path / "set"), "License=CC0"]) == 2


@pytest.mark.parametrize("written", ["{license: [a]}", "{License: x}", "{a: ''}", "license", "{a: b", '{a: "b\\n"}'])
def test_what_is_no_tag_is_one_line(written: str) -> None:
    with pytest.raises(ConfigError, match="write tags=") as caught:
        parse_tags(written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "tags", "fault"),
    [
        (None, {}, ""),
        (["license:CC0"], {"license": "CC0"}, ""),
        (["license:CC0", "license:MIT", "source:*"], {"license": "MIT", "source": "x"}, ""),
        (["license:CC0"], {}, "has no tags"),
        (["license:CC0"], {"license": "CC-BY"}, "has the tag license:CC-BY, which is not allowed"),
        (["license:CC0"], {"license": "CC0", "sensitivity": "personal"}, "has the tag sensitivity:personal"),
        (["license:CC0", "source:*"], {"license": "CC0"}, "has no tag 'source'"),
        ([], {"license": "CC0"}, "has the tag license:CC0"),
    ],
)
def test_a_policy_allows_what_it_names_and_nothing_else(
    allowed: list[str] | None, tags: dict[str, str], fault: str
) -> None:
    found = policy_fault(allowed, "set", tags)
    assert fault in found if fault else not found


def test_check_names_a_dataset_that_the_policy_refuses_before_anything_is_queued(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [3], {"id": np.arange(3)})
    data = ["data._target_=everstep.data.prepared", f"data.path={tmp_path / 'set'}", f"run_root={tmp_path}"]
    assert problems([*data, "policy.allow_tags=[license:CC0]"]) == [
        f"policy.allow_tags=[license:CC0]: {tmp_path}/set has no tags; 'everstep data tag {tmp_path}/set NAME=VALUE', "
        "or use other data"
    ]
    keys = ("experiment=breast_cancer", "~data.held_out", "~data.split_seed", data[0], f"+{data[1]}", data[2])
    words = [sys.executable, "-m", "everstep.launch", "check", *keys, "policy.allow_tags=[license:CC0]"]
    whole = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (whole.returncode, whole.stderr.count("has no tags")) == (2, 1), whole.stderr
    assert verb(["data", "tag", str(tmp_path / "set"), "license=CC0"]) == 0
    assert problems([*data, "policy.allow_tags=[license:CC0]"]) == []
    with pytest.raises(ConfigError, match=r"policy\.allow_tags='CC0'"):
        compose(["policy.allow_tags=[CC0]"])


def problems(words: list[str]) -> list[str]:
    composed: Composed = compose(["experiment=digits", *words])
    return check(composed, JobConfig())
