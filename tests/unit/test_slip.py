"""What somebody hears who has mistyped something in a file of their own, or knows our keys by other names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from everstep.compose import compose, groups
from everstep.config.other_trainers_keys import KEYS, meant
from everstep.config_errors import PACKAGE
from everstep.errors import ConfigError
from everstep.frozen_config import keys
from everstep.launch.cli.run import run
from everstep.launch.config import JobConfig, job_config

FILE = "experiment/mine.yaml"
HEAD = f"{PACKAGE}\ndefaults:\n  - override /data: digits\n  - override /task: images\n"


NO_OVERRIDE = "write '- override /data: …' in defaults"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3", "{here}: no key 'stepz'; did you mean 'steps'?"),
        ("batch_size: 3", "{here}: no key 'batch_size'; did you mean 'global_batch'?"),
        ("checkpoint: {evry: 3}", "{here}: no key 'checkpoint.evry'; did you mean 'checkpoint.every'?"),
        ("steps: many", "steps='many': write a whole number of steps, epochs as 3ep, or tokens as 2e9tok"),
        ("parallel: {kind: zero}",
         "{here}: parallel.kind: Invalid value 'zero', expected one of [single, ddp, fsdp, hsdp]"),
        ("checkpoint: 5", "{here}: 5 stands in the place of a group of keys; give the keys below it"),
        ("steps: ${nosuch}", "steps: Interpolation key 'nosuch' not found"),
        ("steps: [1", "{file}, line 6 is no YAML: expected ',' or ']', but got '<stream end>'"),
        ("checkpoint:\n\tevery: 3", "{file}, line 6 is no YAML: found character '\\t' that cannot start any token"),
    ],
)  # fmt: skip
def test_a_slip_in_a_users_own_file_is_one_line_that_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    assert slip(tmp_path, HEAD + text) == said.format(here="experiment/mine.yaml", file=f"{tmp_path}/{FILE}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD.replace("digits", "digitz"), "there is no data 'digitz'; did you mean 'digits'?; there are {data}"),
        (HEAD.replace("/data", "/dota"), "{here}: there is no group 'dota'; did you mean 'data'?; there are {groups}"),
        (HEAD.replace("/data", "data"), f"{{here}}: {NO_OVERRIDE}, with the slash"),
        (HEAD.replace("override /data", "/data"), f"data is chosen twice; {NO_OVERRIDE}, with the word override"),
        (HEAD.removeprefix(PACKAGE), f"{{here}}: make {PACKAGE!r} its first line"),
        ("steps: 5", f"{{here}}: its keys would all lie below 'experiment'; make {PACKAGE!r} its first line"),
        (f"{PACKAGE}\ndefaults: [/modal: mlp]",
         "{here}: there is no group 'modal'; did you mean 'model'?; there are {groups}"),
    ],
)  # fmt: skip
def test_a_slip_in_the_choices_of_a_users_own_file_says_what_to_write(tmp_path: Path, text: str, said: str) -> None:
    there = groups()
    listed = {"data": ", ".join(there["data"]), "groups": ", ".join(there)}
    assert slip(tmp_path, text) == said.format(here="experiment/mine.yaml", **listed)


def slip(folder: Path, text: str) -> str:
    """What is said of such an experiment."""
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_text(f"{text}\n")
    with pytest.raises(ConfigError) as error:
        compose(["experiment=mine"], [str(folder)])
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("max_epochs", "no key 'max_epochs'; write steps=3ep for three epochs"),
        ("trainer.max_epochs", "no key 'trainer.max_epochs'; write steps=3ep for three epochs"),
        ("lr", "no key 'lr'; did you mean 'optimizer.lr'?"),
        ("evaluate.batch_size", "no key 'evaluate.batch_size'; did you mean 'evaluate.batch'?"),
        ("resume_from", "no key 'resume_from'; a run goes on when its run= is given again; "
                        "init_from= takes the weights of another"),
        ("nosuch", "no key 'nosuch'"),
    ],
)  # fmt: skip
def test_a_key_of_another_trainer_is_answered_with_ours(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["experiment=digits", f"{key}=5"])
    assert str(error.value) == said


def test_a_key_of_another_launcher_is_answered_with_ours() -> None:
    with pytest.raises(ConfigError, match=r"no key 'job\.nnodes'; did you mean 'job\.nodes'\?"):
        job_config({"nnodes": 8})


def test_every_key_that_is_named_in_place_of_another_is_there() -> None:
    job = [f"job.{field.name}" for field in dataclasses.fields(JobConfig)]
    plug_ins = ["optimizer.lr", "optimizer.weight_decay", "data.path"]  # of what stands in conf/
    known = {*keys(), *groups(), *job, *plug_ins}
    assert {ours for ours in KEYS if " " not in ours} <= known
    theirs = [name for names in KEYS.values() for name in names.split()]
    assert len(theirs) == len(set(theirs))
    assert [name for name in theirs if name in known] == []
    assert all(meant(name, known) for name in theirs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits"], "cannot read 'digits'; did you mean 'experiment=digits'?"),
        (["mlp"], "cannot read 'mlp'; did you mean 'model=mlp'?"),
        (["experiment=digits", "steps"], "cannot read 'steps'; write steps=VALUE"),
        (["--steps", "5"], "no option --steps; keys have no dashes: write steps=VALUE"),
        (["--max-epochs=5"], "no option --max-epochs; keys have no dashes; write steps=3ep for three epochs"),
        (["--cfgg"], "no option --cfgg; did you mean '--cfg'?"),
        (["--nosuch"], "no option --nosuch; see everstep run --help"),
        (["--config-dir"], "--config-dir: expected one argument; see everstep run --help"),
        (["experiment=digits", "job.nproc=100000"], "job.nproc=100000 is over 16 processes for each of this machine's"),
    ],
)
def test_a_slip_on_the_command_line_is_answered_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(words)
    assert str(error.value).startswith(said)
