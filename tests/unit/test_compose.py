"""From a command line to a config and back: slips, combinations, round trips, and what may change on resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.compose import SWEEPS, compose, conf_dir
from everstep.config import FREE_ON_RESUME, OPEN_NODES, RunConfig, ScheduleConfig
from everstep.errors import ConfigError
from everstep.frozen_config import changes, digest, freeze, keys, plain, refuse_changes, thaw

CONF = conf_dir()
EXAMPLES = Path(__file__).parents[2] / "examples"
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def slip(*overrides: str, experiment: str = "digits") -> str:
    with pytest.raises(ConfigError) as error:
        compose([f"experiment={experiment}", *overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stepz=3", "no key 'stepz'; did you mean 'steps'?"),
        ("checkpoint.evry=3", "no key 'checkpoint.evry'; did you mean 'checkpoint.every'?"),
        ("++checkpoint.evry=3", "no key 'checkpoint.evry'; did you mean 'checkpoint.every'?"),
        ("+scedule.shape=wsd", "no key 'scedule.shape'; did you mean 'schedule.shape'?"),
        ("optimiser=sgd", "no key 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer=adamv", "optimizer=adamv: there is no such optimizer; did you mean 'adamw'?"),
        ("parallel=fdsp", "parallel=fdsp: there is no such parallel; did you mean 'fsdp'?"),
        ("experiment=digit", "experiment=digit: there is no such experiment; did you mean 'digits'?"),
        ("steps", "cannot read 'steps'"),
        ("steps=1,2", "'steps=1,2' names several values: only 'everstep sweep' takes them"),
    ],
)
def test_an_unknown_word_gets_the_nearest_one(override: str, said: str) -> None:
    assert said in slip(override)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=abc", "steps", "'abc'"),
        ("steps=null", "steps", "null"),
        ("global_batch=1e3", "global_batch", "1000.0"),
        ("checkpoint.every=1.5", "checkpoint.every", "'1.5'"),
        ("checkpoint.every=true", "checkpoint.every", "'True'"),
        ("parallel.kind=foo", "parallel.kind", "single, ddp, fsdp, hsdp"),
        ("schedule.shape=cosin", "schedule.shape", "constant, cosine, linear, wsd"),
        ("hooks=3", "hooks", "int is not a ListConfig"),
        ("plugins=mine", "plugins", "write 'plugins=[mine]'"),
        ("init_match=head.*", "init_match", "write 'init_match=[head.*]'"),
        ("optimizer.lr=1e-3,", "optimizer.lr=1e-3,", "; leave out the ',' at its end"),
        ("parallel=FSDP", "parallel", "did you mean 'fsdp'?"),
        ("experiment=mine", "experiment", "one of your own needs --config-dir FOLDER"),
        ("model.width=${nosuch}", "model.width", "'nosuch' not found"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(override: str, key: str, value: str) -> None:
    said = slip(override)
    assert key in said
    assert value in said


IMPOSSIBLE = [
    ("steps=0", "steps=0: must be ≥ 1; change steps"),
    ("global_batch=0", "global_batch=0: must be ≥ 1; change global_batch"),
    ("micro_batch=-1", "micro_batch=-1: must be ≥ 1"),
    ("seed=-1", "seed=-1: must be in [0, 2⁶³)"),
    ("seed=9223372036854775808", "seed=9223372036854775808: must be in [0, 2⁶³)"),
    ("clip=0", "clip=0.0: must be > 0 or null"),
    ("clip=nan", "clip=nan: must be > 0"),
    ("ema=1", "ema=1.0: must be in (0, 1)"),
    ("ema=nan", "ema=nan: must be in (0, 1)"),
    ("run=a/b", "run='a/b': a name has letters"),
    ("run=..", "run='..': a name has letters"),
    ("group_timeout_s=0", "group_timeout_s=0.0: must be > 0"),
    ("parallel.kind=hsdp", "parallel.shard=None: hsdp needs"),
    ("parallel.shard=2", "parallel.shard=2: only hsdp has it, parallel.kind is ddp"),
    ("parallel=hsdp parallel.shard=0", "parallel.shard=0: must be ≥ 1"),
    ("parallel.checkpoint_blocks=-1", "parallel.checkpoint_blocks=-1"),
    ("parallel.bucket_mb=0", "parallel.bucket_mb=0"),
    ("precision.init_scale=0", "precision.init_scale=0.0"),
    ("precision.growth_interval=0", "precision.growth_interval=0"),
    ("schedule.warmup_steps=-1", "schedule.warmup_steps=-1"),
    ("schedule.final_fraction=1.1", "schedule.final_fraction=1.1: must be in [0, 1]"),
    ("schedule.decay_fraction=0", "schedule.decay_fraction=0.0: must be in (0, 1]"),
    ("schedule.over_steps=0", "schedule.over_steps=0"),
    ("checkpoint.every=0", "checkpoint.every=0"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0"),
    ("checkpoint.keep_best=-1", "checkpoint.keep_best=-1"),
    ("checkpoint.keep_every=0", "checkpoint.keep_every=0"),
    ("evaluate.every=0", "evaluate.every=0"),
    ("evaluate.batch=0", "evaluate.batch=0"),
    ("evaluate.limit=0", "evaluate.limit=0"),
    ("evaluate.patience=0", "evaluate.patience=0"),
    ("evaluate.min_delta=-1", "evaluate.min_delta=-1.0"),
    ("evaluate.weights=ema", "evaluate.weights='ema': there is no moving average to evaluate while ema is null"),
    ("nonfinite.limit=0", "nonfinite.limit=0"),
    ("stop.wall_time_s=0", "stop.wall_time_s=0.0"),
    ("stop.poll_s=0", "stop.poll_s=0.0"),
    ("log.every=0", "log.every=0"),
    ("log.line_every_s=-1", "log.line_every_s=-1.0"),
    ("log.wandb.mode=onlin", "log.wandb.mode='onlin': must be one of online, offline, disabled"),
    ("loader.prefetch=-1", "loader.prefetch=-1"),
    ("loader.workers=-1", "loader.workers=-1"),
    ("task=null", "task=null: nothing to train; give experiment=NAME"),
    ("data=null", "data=null: nothing to train; give experiment=NAME"),
]


@pytest.mark.parametrize(("overrides", "said"), IMPOSSIBLE)
def test_what_cannot_run_is_said_with_the_value_the_limit_and_the_key(overrides: str, said: str) -> None:
    assert said in slip(*overrides.split())


def test_a_group_that_the_experiment_chose_can_be_left_out_again() -> None:
    assert compose(["experiment=digits", "model=null"]).run.model is None
    assert compose(["experiment=digits", "schedule=null"]).run.schedule == ScheduleConfig(warmup_steps=20)


@pytest.mark.parametrize("overrides", [["optimizer=null"], ["optimizer=null", "optimizer.lr=3"]])
def test_keys_below_a_plug_in_that_was_left_out_are_a_slip(overrides: list[str]) -> None:
    assert "optimizer has keys (lr, weight_decay) but no _target_; give optimizer=NAME" in slip(*overrides)
    assert "a key was given below a plug-in that is null" in slip("model=null", "model.width=3")


def test_a_users_folder_adds_options_and_may_name_their_own_packages(tmp_path: Path) -> None:
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: wide\n"
                                "plugins: [shop]\ntask: {_target_: shop.T}\ndata: {_target_: shop.D}\n",
        "model/wide.yaml": "_target_: shop.M\nwidth: 9\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    composed = compose(["experiment=mine", "model.width=${seed}", "seed=5"], [str(tmp_path)])
    assert composed.run.model == {"_target_": "shop.M", "width": 5}
    assert composed.run.plugins == ["shop"]
    assert composed.experiment == "mine"
    with pytest.raises(ConfigError, match=r"there are breast_cancer, digits, .*documents, .*mine"):
        compose(["experiment=yours"], [str(tmp_path)])


def test_a_users_file_that_speaks_of_hydras_own_keys_still_composes(tmp_path: Path) -> None:
    file = tmp_path / "experiment/moved.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\ndefaults:\n  - digits\n  - override /hydra/job_logging: disabled\n"
                    "hydra: {run: {dir: 'outputs/${now:%Y}'}, job: {name: moved}}\n")  # fmt: skip
    assert compose(["experiment=moved"], [str(tmp_path)]).run == compose(["experiment=digits"]).run


def test_a_users_folder_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ConfigError, match="--config-dir /nosuch: no such folder"):
        compose(["experiment=digits"], ["/nosuch"])


@pytest.mark.parametrize("text", ["steps: [", "stepz: 3", "steps: many"])
def test_a_slip_in_a_users_own_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as error:
        compose(["experiment=mine"], [str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_freezing_and_thawing_gives_every_experiment_back(experiment: str) -> None:
    run = compose([f"experiment={experiment}"]).run
    assert thaw(freeze(run)) == run
    assert freeze(thaw(freeze(run))) == freeze(run)
    assert digest(thaw(freeze(run))) == digest(run)


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=("Cc", "Cs")), max_size=8)
AWKWARD = st.sampled_from(["1e-3", "0x10", "1_000", "null", "off", "yes", "~", "", " a", "a: b", "- a", "1:30", "é\n"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | AWKWARD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "on"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["width", "name", "y"]), VALUES, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_arguments_of_a_plug_in_survive_the_run_folder(arguments: dict[str, Any]) -> None:
    run = RunConfig(model={"_target_": "a.B", **arguments})
    assert thaw(freeze(run)) == run


@pytest.mark.parametrize("text", ["", "- 1", "steps: many", "stepz: 1", "steps: [", "steps: 0", "a: ${b", "\0"])
def test_text_that_is_no_config_is_one_line(text: str) -> None:
    if text == "":
        assert thaw(text) == RunConfig()
        return
    with pytest.raises(ConfigError, match=r"config\.yaml of the run folder") as error:
        thaw(text)
    assert "\n" not in str(error.value)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and prefix + key not in OPEN_NODES:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize(
    "file", [*sorted(CONF.rglob("*.yaml")), *sorted(EXAMPLES.rglob("conf/**/*.yaml"))], ids=lambda file: file.stem
)
def test_yaml_does_not_repeat_what_the_dataclass_says(file: Path) -> None:
    text, group = file.read_text(), file.parent.name
    tree = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k != "defaults"}
    # A plug-in's arguments, and the launcher's part, are not the trainer's keys.
    # The debug group also sets back what an experiment has chosen.
    if file.parent == CONF or "job" in file.parts or group in (*OPEN_NODES, SWEEPS, "debug"):
        return
    defaults = dict(leaves(plain(RunConfig())))
    said = dict(leaves(tree if "@package _global_" in text else {group: tree}))
    assert [key for key in said if key not in defaults and key not in OPEN_NODES] == []
    assert [key for key, value in said.items() if key in defaults and defaults[key] == value] == []


def test_every_key_has_a_default_that_may_run() -> None:
    assert {"steps", "checkpoint.every", "log.wandb.mode", "resume.allow"} <= set(keys())
    for field in dataclasses.fields(RunConfig):
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


FREE = [
    "steps=999", "run_root=elsewhere", "parallel=fsdp", "parallel.bucket_mb=1", "checkpoint=often",
    "checkpoint.keep_every=7", "evaluate.every=5", "evaluate.batch=3", "stop.wall_time_s=9", "log=wandb",
    "log.every=1", "loader.workers=1", "group_timeout_s=9", "hooks=[{_target_: mine.x}]", "plugins=[mine]",
]  # fmt: skip
HELD = [
    "seed=1", "global_batch=2", "micro_batch=2", "clip=null", "ema=0.5", "optimizer.lr=1", "optimizer=sgd",
    "model.width=64", "data.held_out=0.3", "task.extra=1", "schedule=wsd", "schedule.warmup_steps=1",
    "precision=bf16", "evaluate.goal=min", "evaluate.metric=loss", "evaluate.limit=3", "nonfinite.policy=rollback",
    "init_from=elsewhere", "init_from=x init_match=[a]", "steps=5 seed=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def first() -> RunConfig:
    return compose(["experiment=digits", "run=r"]).run


@pytest.mark.parametrize("override", FREE)
def test_a_run_may_go_on_with_another_value_of_a_free_key(first: RunConfig, override: str) -> None:
    later = compose(["experiment=digits", "run=r", override]).run
    found = refuse_changes(first, later)
    assert found
    assert all(str(change).startswith(FREE_ON_RESUME) for change in found)


@pytest.mark.parametrize("overrides", HELD)
def test_a_run_may_not_go_on_with_other_maths_unless_it_is_allowed(first: RunConfig, overrides: str) -> None:
    words = ["experiment=digits", "run=r", *overrides.split()]
    later = compose(words).run
    held = [change for change in changes(first, later) if change.key != "steps"]
    assert held
    with pytest.raises(ConfigError, match="run 'r' was started with another config") as error:
        refuse_changes(first, later)
    for change in held:
        assert f"{change.key}: {change.old} → {change.new}" in str(error.value)
    allow = str(error.value).rsplit("'", 2)[1]
    assert allow.startswith("resume.allow=[")
    assert "steps" not in allow.split(",")
    assert refuse_changes(first, compose([*words, allow]).run)


def test_allowing_a_group_allows_the_keys_below_it(first: RunConfig) -> None:
    later = compose(["experiment=digits", "run=r", "optimizer.lr=1", "resume.allow=[optimizer]"]).run
    assert refuse_changes(first, later)


def test_nothing_changed_is_no_change(first: RunConfig) -> None:
    assert refuse_changes(first, compose(["experiment=digits", "run=r"]).run) == []
